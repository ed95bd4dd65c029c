// Online softmax over key tiles (Milakov & Gimelshein 2018; Dao et al. 2022), in base 2.
#pragma once

#include "../params.h"
#include "matmul.h"

namespace fastattn {

// A query row is spread over the four lanes of a quad.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// kM tiles of 16 rows; a lane holds rows lane / 4 and lane / 4 + 8 of each. Scores times `scale` are base-2
// exponents.
//
// Weights are kept relative to a base near the running maximum. The base follows the maximum only when that
// is ahead by more than kSlack: weights then stay below 2^kSlack, which no format here overflows at, and
// nearly all tiles skip both the reduction over the quad and the rescaling of what was accumulated.
template <int kM>
struct OnlineSoftmax {
  static constexpr float kSlack = 8.0f;
  float base[kM][2];  // -inf until the row has seen a key
  float sum[kM][2];   // this lane's part of sum exp2(score - base)

  __device__ __forceinline__ void init() {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) base[m][half] = -INFINITY, sum[m][half] = 0.0f;
  }

  // Scores become weights; where a base moves, what was accumulated is brought to it.
  template <int kKeyTiles, int kValueTiles>
  __device__ __forceinline__ void update(float (&scores)[kM][kKeyTiles][4], float (&out)[kM][kValueTiles][4],
                                         float scale) {
    float highest[kM][2];
    if (find_highest(scores, scale, highest)) {
      float factor[kM][2];
      move_base(highest, scale, factor);
      rescale(out, factor);
    }
    weigh(scores, scale);
  }

  // The steps of an update. Largest scores of this lane; true, for the whole warp, when a base is to move.
  template <int kKeyTiles>
  __device__ __forceinline__ bool find_highest(const float (&scores)[kM][kKeyTiles][4], float scale,
                                               float (&highest)[kM][2]) const {
    bool ahead = false;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        highest[m][half] = fmaxf(scores[m][0][2 * half], scores[m][0][2 * half + 1]);
#pragma unroll
        for (int n = 1; n < kKeyTiles; ++n)
          highest[m][half] =
              fmaxf(highest[m][half], fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        ahead |= fmaf(highest[m][half], scale, -base[m][half]) > kSlack;  // -inf - -inf is NaN: not ahead
      }
    return __any_sync(0xffffffffu, ahead);
  }

  // Moves the bases that are behind. `factor` is what sums over the earlier weights are to be multiplied by.
  __device__ __forceinline__ void move_base(const float (&highest)[kM][2], float scale,
                                            float (&factor)[kM][2]) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float target = quad_max(highest[m][half]) * scale, old = base[m][half];
        if (target - old > kSlack) base[m][half] = target;
        factor[m][half] = old == base[m][half] ? 1.0f : ptx::exp2(old - base[m][half]);
        sum[m][half] *= factor[m][half];
      }
  }

  template <int kValueTiles>
  __device__ __forceinline__ static void rescale(float (&out)[kM][kValueTiles][4],
                                                 const float (&factor)[kM][2]) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kValueTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[m][n][e] *= factor[m][e / 2];
  }

  template <int kKeyTiles>
  __device__ __forceinline__ void weigh(float (&scores)[kM][kKeyTiles][4], float scale) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float from = finite_base(base[m][half]);
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            scores[m][n][e] = ptx::exp2(fmaf(scores[m][n][e], scale, -from));
            sum[m][half] += scores[m][n][e];
          }
      }
  }

  // Ends a row: 1 / sum (0 for a row that saw no key) and the natural log-sum-exp.
  __device__ __forceinline__ void finish(int m, int half, float& inverse, float& lse) const {
    const float total = quad_sum(sum[m][half]);
    const bool empty = base[m][half] == -INFINITY;
    inverse = empty ? 0.0f : 1.0f / total;
    lse = empty ? -INFINITY : (base[m][half] + ptx::log2(total)) * kLn2;
  }

 private:
  // A row that has seen no key has weights exp2(-inf - 0) = 0 rather than exp2(-inf + inf).
  __device__ __forceinline__ static float finite_base(float base) { return base == -INFINITY ? 0.0f : base; }
};

}  // namespace fastattn
