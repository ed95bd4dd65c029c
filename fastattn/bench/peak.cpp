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
constexpr int64_t kInner = 1 << 16;

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
float chains(int64_t rounds) {
  Unit unit;
  asm volatile("" : "+m"(unit));  // keeps the constants from being folded
  Vector sums[kChains] = {};
  for (int64_t round = 0; round < rounds; ++round)
    for (int c = 0; c < kChains; ++c) sums[c] = unit.step(sums[c]);
  float total = 0;
  for (const Vector& sum : sums)
    for (int lane = 0; lane < kBytes / 4; ++lane) total += sum[lane];
  return total;
}

template <class Unit>
double best_flops_per_second(int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  double best = 0;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  do {
    const auto start = Clock::now();
    std::vector<std::thread> team;
    for (int t = 0; t < threads; ++t)
      team.emplace_back([] {
        volatile float sink = chains<Unit>(kInner * 16);
        (void)sink;
      });
    for (std::thread& member : team) member.join();
    const std::chrono::duration<double> passed = Clock::now() - start;
    const double flops = static_cast<double>(Unit::kFlops) * kChains * kInner * 16 * threads / passed.count();
    if (flops > best) best = flops;
  } while (Clock::now() < end);
  return best;
}

}  // namespace

extern "C" double fastattn_peak_fp32(int threads, double seconds) {
  return best_flops_per_second<Fp32>(threads, seconds);
}
extern "C" double fastattn_peak_bf16(int threads, double seconds) {
  return best_flops_per_second<Bf16>(threads, seconds);
}
