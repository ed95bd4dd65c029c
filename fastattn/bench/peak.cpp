// The most multiply-adds that this machine makes in registers, all threads busy: the roof that a
// kernel's speed is a share of. Built by peak.py with the flags of one instruction set.
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes)));

constexpr int kChains = 12;  // enough to hide the latency of two units, few enough for 16 registers
constexpr int64_t kRounds = 1 << 20;
// Unequal, and unknown to the compiler: of equal chains it would compute one.
volatile float chain_starts[kChains] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};

struct Fp32 {
  static constexpr int64_t kFlops = 2 * kBytes / 4;
  Vector factor = Vector{} + 0.999f, summand = Vector{} + 1e-3f;
  Vector step(Vector sum) const { return sum * factor + summand; }
};

#if defined(__AVX512BF16__)
struct Bf16 {
  static constexpr int64_t kFlops = 4 * kBytes / 4;
  __m512bh left = (__m512bh)_mm512_set1_epi32(0x3c003c00), right = (__m512bh)_mm512_set1_epi32(0x3c003c00);
  Vector step(Vector sum) const { return (Vector)_mm512_dpbf16_ps((__m512)sum, left, right); }
};
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
struct Bf16 {  // BFMMLA: a 2x4 by 4x2 product
  static constexpr int64_t kFlops = 32;
  bfloat16x8_t left = vreinterpretq_bf16_u16(vdupq_n_u16(0x3c00)), right = left;
  Vector step(Vector sum) const { return (Vector)vbfmmlaq_f32((float32x4_t)sum, left, right); }
};
#else
using Bf16 = Fp32;  // without the instruction, 16-bit products are made in fp32
#endif

template <class Unit>
struct Chains {
  static constexpr int64_t kFlops = Unit::kFlops * kChains;
  static float run() {
    Unit unit;
    asm volatile("" : "+m"(unit));  // keeps the constants from being folded
    Vector sums[kChains];
    for (int c = 0; c < kChains; ++c) sums[c] = Vector{} + chain_starts[c];
    for (int64_t round = 0; round < kRounds; ++round)
      for (int c = 0; c < kChains; ++c) sums[c] = unit.step(sums[c]);
    float total = 0;
    for (const Vector& sum : sums)
      for (int lane = 0; lane < kBytes / 4; ++lane) total += sum[lane];
    return total;
  }
};

#if defined(__AMX_BF16__)
// Products of 16 x 32 and 32 x 16 added to four tiles of sums, with the four operands that this leaves room
// for.
struct Tiles {
  static constexpr int64_t kFlops = 4 * 2 * 16 * 16 * 32;
  static float run() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    alignas(64) static const float zeros[256] = {};
    alignas(64) float sums[256];
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, zeros, 64);
    _tile_loadd(5, zeros, 64);
    _tile_loadd(6, zeros, 64);
    _tile_loadd(7, zeros, 64);
    for (int64_t round = 0; round < kRounds; ++round) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_release();
    return sums[0];
  }
};
#endif

template <class Work>
double best_flops_per_second(int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  double best = 0;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  do {
    const auto start = Clock::now();
    std::vector<std::thread> team;
    for (int t = 0; t < threads; ++t)
      team.emplace_back([] {
        volatile float sink = Work::run();
        (void)sink;
      });
    for (std::thread& member : team) member.join();
    const std::chrono::duration<double> passed = Clock::now() - start;
    const double flops = static_cast<double>(Work::kFlops) * kRounds * threads / passed.count();
    if (flops > best) best = flops;
  } while (Clock::now() < end);
  return best;
}

}  // namespace

extern "C" double fastattn_peak_fp32(int threads, double seconds) {
  return best_flops_per_second<Chains<Fp32>>(threads, seconds);
}
extern "C" double fastattn_peak_bf16(int threads, double seconds) {
#if defined(__AMX_BF16__)
  constexpr int kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  if (syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0)
    return best_flops_per_second<Tiles>(threads, seconds);
#endif
  return best_flops_per_second<Chains<Bf16>>(threads, seconds);
}
