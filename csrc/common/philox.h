/* Philox4x32-7 (Salmon, Moraes, Dror, Shaw 2011) and the dropout stream built on it; docs/architecture.md has
 * the contract. One text serves the host and CUDA threads; csrc/cpu/dropout.h draws the same by vectors. */
#ifndef FASTATTN_COMMON_PHILOX_H
#define FASTATTN_COMMON_PHILOX_H

#include <stdint.h>

#if defined(__CUDACC__)
#define FASTATTN_INLINE static __host__ __device__ __forceinline__
#else
#define FASTATTN_INLINE static inline __attribute__((always_inline))
#endif

namespace fastattn {

/* Keys j of one row are drawn in blocks of 128: 16 counters, each of which serves 8 keys 16 apart. */
enum { kDropoutBlock = 128, kDropoutLanes = 16, kDropoutSlots = 8, kPhiloxRounds = 7 };

/* Multipliers of words 0 and 2, and what a round adds to each half of the key. */
enum : uint32_t {
  kPhiloxFactor0 = 0xD2511F53u,
  kPhiloxFactor1 = 0xCD9E8D57u,
  kPhiloxStep0 = 0x9E3779B9u,
  kPhiloxStep1 = 0xBB67AE85u
};

/* r holds the counter on entry and the four random words on return. */
FASTATTN_INLINE void philox(uint64_t seed, uint32_t (&r)[4]) {
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 7
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t high0 = (uint32_t)(((uint64_t)r[0] * kPhiloxFactor0) >> 32), low0 = r[0] * kPhiloxFactor0;
    const uint32_t high1 = (uint32_t)(((uint64_t)r[2] * kPhiloxFactor1) >> 32), low1 = r[2] * kPhiloxFactor1;
    r[0] = high1 ^ r[1] ^ key0;
    r[1] = low1;
    r[2] = high0 ^ r[3] ^ key1;
    r[3] = low0;
    key0 += kPhiloxStep0;
    key1 += kPhiloxStep1;
  }
}

/* A weight is dropped when its 16 random bits are below this. */
FASTATTN_INLINE uint32_t dropout_threshold(float p) { return (uint32_t)(p * 65536.0f + 0.5f); }

/* What kept weights are multiplied with, so that their expectation stays. */
FASTATTN_INLINE float dropout_scale(float p) {
  const uint32_t threshold = dropout_threshold(p);
  return threshold >= 65536u ? 0.0f : 65536.0f / (float)(65536u - threshold);
}

/* One weight, for tests and for code that visits single weights. */
FASTATTN_INLINE bool dropout_keeps(uint64_t seed, uint32_t threshold, uint32_t b, uint32_t h, uint32_t i,
                                   uint32_t j) {
  uint32_t r[4] = {i, j / kDropoutBlock * kDropoutLanes + j % kDropoutLanes, h, b};
  philox(seed, r);
  const uint32_t slot = j / kDropoutLanes % kDropoutSlots;
  const uint32_t word = slot < 4 ? (slot < 2 ? r[0] : r[1]) : (slot < 6 ? r[2] : r[3]);
  return (slot % 2 == 0 ? word & 0xFFFFu : word >> 16) >= threshold;
}

}  // namespace fastattn

#endif  // FASTATTN_COMMON_PHILOX_H
