// Warp-level matrix products: accumulators += left * right. The warp owns 16 kM rows of the result.
//
// A left operand lives in registers (RegisterOperand, loaded once) or in shared memory (SharedOperand, loaded
// in every product where registers are short); both answer load(step).
#pragma once

#include "tile.h"

namespace fastattn {

template <typename Tile, int kM>
struct SharedOperand {
  static constexpr int kSteps = Tile::kCols / Element<typename Tile::T>::kStep;
  uint32_t address;

  __device__ __forceinline__ void init(uint32_t tile, int row) {
    address = Tile::left_address(tile + row * Tile::kRowBytes, threadIdx.x % 32);
  }
  __device__ __forceinline__ void load(Operand (&a)[kM], int step) const {
#pragma unroll
    for (int m = 0; m < kM; ++m) Tile::load_left(a[m], address, 16 * m, step);
  }
};

template <typename Tile, int kM>
struct RegisterOperand {
  static constexpr int kSteps = SharedOperand<Tile, kM>::kSteps;
  Operand fragments[kSteps][kM];

  __device__ __forceinline__ void init(uint32_t tile, int row) {
    SharedOperand<Tile, kM> source;
    source.init(tile, row);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) source.load(fragments[step], step);
  }
  __device__ __forceinline__ void load(Operand (&a)[kM], int step) const {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m][i] = fragments[step][m][i];
  }
};

template <int kM, int kTiles>
__device__ __forceinline__ void fill(float (&acc)[kM][kTiles][4], const float (&tile)[4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[m][n][e] = tile[e];
}
template <int kM, int kTiles>
__device__ __forceinline__ void clear(float (&acc)[kM][kTiles][4]) {
  fill(acc, {0.0f, 0.0f, 0.0f, 0.0f});
}

// acc += left * tile^T: the tile's rows are the columns of the result (scores: queries x keys).
template <typename Tile, int kM, int kTiles, typename Left>
__device__ __forceinline__ void multiply_rows(float (&acc)[kM][kTiles][4], const Left& left, uint32_t tile) {
  using T = typename Tile::T;
  static_assert(kTiles % 2 == 0);
  const uint32_t lane = Tile::right_address(Tile::kLanesApart ? 0 : tile, threadIdx.x % 32);
  if (!Tile::kLanesApart) tile = 0;
#pragma unroll
  for (int step = 0; step < Left::kSteps; ++step) {
    Operand a[kM];
    left.load(a, step);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      Tile::load_right(b, tile, lane, 8 * n, step);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        Element<T>::mma(acc[m][n], a[m], b[0], b[1]);
        Element<T>::mma(acc[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// acc += weights * tile: the tile's rows are summed over (weights x values).
template <typename Tile, int kM, int kTiles, int kWeightTiles>
__device__ __forceinline__ void multiply_sum(float (&acc)[kM][kTiles][4],
                                             const float (&weights)[kM][kWeightTiles][4], uint32_t tile) {
  using T = typename Tile::T;
  const uint32_t lane = Tile::transposed_address(Tile::kLanesApart ? 0 : tile, threadIdx.x % 32);
  if (!Tile::kLanesApart) tile = 0;
#pragma unroll
  for (int step = 0; step < kWeightTiles * 8 / Element<T>::kStep; ++step) {
    Operand a[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) to_operand<T>(a[m], weights[m], step);
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      Tile::load_transposed(b, tile, lane, step, n / 2);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        Element<T>::mma(acc[m][n], a[m], b[0], b[1]);
        Element<T>::mma(acc[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

template <int kM, int kTiles>
__device__ __forceinline__ bool all_finite(const float (&acc)[kM][kTiles][4]) {
  float sum = 0.0f;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum = fmaf(acc[m][n][e], 0.0f, sum);
  return sum == 0.0f;
}

}  // namespace fastattn
