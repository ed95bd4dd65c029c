// Which instruction sets are compiled in, which of them this machine runs, and which one is used.
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#if defined(__x86_64__)
#include <cpuid.h>
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
FASTATTN_DECLARE(isa_emulated512)
FASTATTN_DECLARE(isa_emulated512_bf16)
FASTATTN_DECLARE(isa_neon)
FASTATTN_DECLARE(isa_neon_bf16)
#undef FASTATTN_DECLARE

namespace {

bool always() { return true; }
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
#elif defined(__aarch64__)
[[maybe_unused]] bool has_neon_bf16() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP2) & (1UL << 14)) != 0;  // HWCAP2_BF16
#else
  return false;
#endif
}
#endif

struct Candidate {
  const Kernels* kernels;
  bool (*runs)();
  bool automatic;  // false: only where FASTATTN_CPU_ISA names it
};

// From the lowest to the highest.
const Candidate kCandidates[] = {
    {&isa_portable::kernels, always, true},
#if defined(FASTATTN_HAVE_EMULATED512)
    {&isa_emulated512::kernels, has_avx2, false},
    {&isa_emulated512_bf16::kernels, has_avx2, false},
#endif
#if defined(FASTATTN_HAVE_AVX2)
    {&isa_avx2::kernels, has_avx2, true},
#endif
#if defined(FASTATTN_HAVE_AVX512)
    {&isa_avx512::kernels, has_avx512, true},
#endif
#if defined(FASTATTN_HAVE_AVX512_BF16)
    {&isa_avx512_bf16::kernels, has_avx512_bf16, true},
#endif
#if defined(FASTATTN_HAVE_NEON)
    {&isa_neon::kernels, always, true},
#endif
#if defined(FASTATTN_HAVE_NEON_BF16)
    {&isa_neon_bf16::kernels, has_neon_bf16, true},
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
      if (c.automatic && c.runs()) best = c.kernels;
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
