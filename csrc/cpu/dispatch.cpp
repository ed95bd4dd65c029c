// Which instruction sets are compiled in, which of them this machine runs, and which one is used.
#include <stdlib.h>
#include <string.h>

#include <initializer_list>

#include "internal.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace fastattn {

#define FASTATTN_DECLARE(ns)    \
  namespace ns {                \
  extern const Kernels kernels; \
  }
FASTATTN_DECLARE(isa_portable)
FASTATTN_DECLARE(isa_avx2)
FASTATTN_DECLARE(isa_avx512)
FASTATTN_DECLARE(isa_avx512_bf16)
FASTATTN_DECLARE(isa_amx_bf16)
FASTATTN_DECLARE(isa_emulated512)
FASTATTN_DECLARE(isa_emulated512_bf16)
FASTATTN_DECLARE(isa_emulated512_amx)
FASTATTN_DECLARE(isa_neon)
FASTATTN_DECLARE(isa_neon_bf16)
#undef FASTATTN_DECLARE

namespace {

bool always() { return true; }
[[maybe_unused]] bool never() { return false; }
#if defined(__x86_64__)
bool has_f16c() {  // not a name that every compiler's __builtin_cpu_supports knows
  // Asked once: in a virtual machine cpuid leaves it for the host, which costs microseconds.
  static const bool answer = [] {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  }();
  return answer;
}
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}
[[maybe_unused]] bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
// Intel's dot product makes half as many multiply-adds a cycle as its fp32 FMA does (123 beside 236 GF/s on a
// Xeon with AMX), AMD's twice as many.
[[maybe_unused]] bool has_fast_bf16_dot() { return has_avx512_bf16() && !__builtin_cpu_is("intel"); }
// AMX is there when the processor has it and Linux, asked once for the whole process, lets us use its state.
[[maybe_unused]] bool has_amx_bf16() {
#if defined(__linux__)
  static const bool answer = [] {
    constexpr unsigned kTile = 1u << 24, kBF16 = 1u << 22;  // edx of leaf 7
    unsigned a, b, c, d;
    if (!has_avx512_bf16() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
    if ((d & kTile) == 0 || (d & kBF16) == 0) return false;
    constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
    return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
  }();
  return answer;
#else
  return false;
#endif
}
#elif defined(__aarch64__)
[[maybe_unused]] bool has_neon_bf16() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP2) & (1UL << 14)) != 0;  // HWCAP2_BF16
#else
  return false;
#endif
}
#endif

// Kernels that have bf16 products alone, completed by those of the instruction set below.
[[maybe_unused]] Kernels bf16_over(const Kernels& below, const Kernels& bf16) {
  Kernels table = below;
  table.name = bf16.name;
  for (auto member : {&Kernels::forward, &Kernels::forward_merge, &Kernels::backward_kv, &Kernels::backward_q,
                      &Kernels::backward_bias, &Kernels::backward_relative})
    for (auto dtype : {FASTATTN_BF16, FASTATTN_F32_BF16_PRODUCTS, FASTATTN_F32_SPLIT_PRODUCTS})
      (table.*member)[dtype] = (bf16.*member)[dtype];
  return table;
}
#if defined(FASTATTN_HAVE_EMULATED512_AMX)
const Kernels kEmulatedAmx = bf16_over(isa_emulated512_bf16::kernels, isa_emulated512_amx::kernels);
#endif
#if defined(FASTATTN_HAVE_AMX_BF16)
const Kernels kAmx = bf16_over(isa_avx512_bf16::kernels, isa_amx_bf16::kernels);
#endif

struct Candidate {
  const Kernels* kernels;
  bool (*runs)();
  bool (*pays)();  // false: only where FASTATTN_CPU_ISA names it
};

// From the lowest to the highest.
const Candidate kCandidates[] = {
    {&isa_portable::kernels, always, always},
#if defined(FASTATTN_HAVE_EMULATED512)
    {&isa_emulated512::kernels, has_avx2, never},
#endif
#if defined(FASTATTN_HAVE_EMULATED512_BF16)
    {&isa_emulated512_bf16::kernels, has_avx2, never},
#endif
#if defined(FASTATTN_HAVE_EMULATED512_AMX)
    {&kEmulatedAmx, has_avx2, never},
#endif
#if defined(FASTATTN_HAVE_AVX2)
    {&isa_avx2::kernels, has_avx2, has_avx2},
#endif
#if defined(FASTATTN_HAVE_AVX512)
    {&isa_avx512::kernels, has_avx512, has_avx512},
#endif
#if defined(FASTATTN_HAVE_AVX512_BF16)
    {&isa_avx512_bf16::kernels, has_avx512_bf16, has_fast_bf16_dot},
#endif
#if defined(FASTATTN_HAVE_AMX_BF16)
    {&kAmx, has_amx_bf16, has_amx_bf16},
#endif
#if defined(FASTATTN_HAVE_NEON)
    {&isa_neon::kernels, always, always},
#endif
#if defined(FASTATTN_HAVE_NEON_BF16)
    {&isa_neon_bf16::kernels, has_neon_bf16, has_neon_bf16},
#endif
};

// Names of the candidates that this machine runs, comma-separated.
const char* runnable_names() {
  static char names[128];
  static const bool once = [] {
    for (const Candidate& c : kCandidates) {
      if (!c.runs()) continue;
      if (names[0] != 0) strcat(names, ",");
      strcat(names, c.kernels->name);
    }
    return true;
  }();
  (void)once;
  return names;
}

}  // namespace

const Kernels* select_kernels(fastattn_status* status) {
  // Read at each call: a getenv costs nanoseconds, and a test can then force one instruction set after
  // another.
  const char* wanted = getenv("FASTATTN_CPU_ISA");
  const Kernels* best = nullptr;
  for (const Candidate& c : kCandidates) {
    if (wanted == nullptr || wanted[0] == 0) {
      if (c.pays()) best = c.kernels;
    } else if (strcmp(wanted, c.kernels->name) == 0) {
      if (c.runs()) return c.kernels;
      *status =
          fail(FASTATTN_UNSUPPORTED, "FASTATTN_CPU_ISA is %s, which this processor does not run; it runs %s.",
               wanted, runnable_names());
      return nullptr;
    }
  }
  if (best == nullptr)
    *status = fail(FASTATTN_INVALID_ARGUMENT,
                   "FASTATTN_CPU_ISA is '%.64s', which this library does not have; it has %s.", wanted,
                   runnable_names());
  return best;
}

}  // namespace fastattn

extern "C" const char* fastattn_cpu_isa(void) {
  fastattn_status status;
  const fastattn::Kernels* kernels = fastattn::select_kernels(&status);
  return kernels == nullptr ? "" : kernels->name;
}

extern "C" const char* fastattn_cpu_isas(void) { return fastattn::runnable_names(); }
