// Gradients of what is added to the scores: bias, and relative_bias by diagonals. A block owns what its
// square tile of score gradients is summed into, and goes through every tile that adds to it, so no two
// blocks write the same number and the order of summation is fixed.
//   bias:           a tile of (row, column), summed over the axes the bias is broadcast on;
//   relative_bias:  a diagonal of tiles of one head, over all sequences. Every tile of it has the same 2 *
//   tile - 1
//                   diagonals, and each of these is shared with the neighbouring tile diagonal only: both
//                   leave partial sums, and finish_relative_bias (auxiliary.cu) adds the two.
#pragma once

#include "query_gradient.h"

namespace fastattn {

template <typename T, int kDim>
struct ScoreGradientShape {
  static constexpr int kSide = score_gradient_tile(sizeof(T), kDim);
  static constexpr int kThreads = kSide * 2;
  using Operands = Tile<T, kSide, kDim>;
  static constexpr int kSumStride = kSide + 1;
  static constexpr int kSumBytes = kSide * kSumStride * 4;
  static constexpr int kSharedBytes = 4 * Operands::kBytes > kSumBytes ? 4 * Operands::kBytes : kSumBytes;
  static_assert(kSharedBytes <= kSharedLimit);
};

// The tile a block is at, of those it goes through: sequences x heads x a rectangle or a diagonal of tiles.
// Counted on, not divided out of the number of a step: the reciprocals would take the loop's registers.
template <int kSide, typename V>
struct ScoreSteps {
  int q, k, head, batch;
  int first_q, first_k, first_head, first_batch;
  bool diagonal;

  __device__ __forceinline__ explicit ScoreSteps(const Params& p) {
    // The variant of everything asks at run time which gradient is wanted.
    diagonal = V::kRelative && (!V::kBias || p.drelative_partial != nullptr);
    int index = blockIdx.x;
    if (diagonal) {
      const int offset = index % p.diagonals - (q_tiles(p) - 1);  // k tile - q tile
      first_head = index / p.diagonals, first_batch = 0;
      first_q = max(0, -offset), first_k = first_q + offset;
    } else {
      const int k_blocks = p.dbias_k == 1 ? 1 : k_tiles(p), q_blocks = p.dbias_q == 1 ? 1 : q_tiles(p);
      first_k = index % k_blocks, index /= k_blocks;
      first_q = index % q_blocks, index /= q_blocks;
      first_head = index % p.dbias_heads, first_batch = index / p.dbias_heads;
    }
    q = first_q, k = first_k, head = first_head, batch = first_batch;
  }
  __device__ __forceinline__ bool done(const Params& p) const {
    return batch >= (diagonal || p.dbias_batch == 1 ? p.batch : first_batch + 1);
  }
  __device__ __forceinline__ void next(const Params& p) {
    ++k;
    if (!diagonal) {
      if (p.dbias_k == 1 && k < k_tiles(p)) return;
      k = first_k;
    }
    ++q;
    if (diagonal ? q < q_tiles(p) && k < k_tiles(p) : p.dbias_q == 1 && q < q_tiles(p)) return;
    q = first_q, k = first_k;
    if (!diagonal && p.dbias_heads == 1 && ++head < p.heads) return;
    head = first_head, ++batch;
  }

 private:
  __device__ __forceinline__ static int q_tiles(const Params& p) { return ceil_div(p.len_q, kSide); }
  __device__ __forceinline__ static int k_tiles(const Params& p) { return ceil_div(p.len_k, kSide); }
};

template <typename T, int kDim, typename V>
__global__ void __launch_bounds__(ScoreGradientShape<T, kDim>::kThreads)
    score_gradient(const __grid_constant__ Params p) {
  using Shape = ScoreGradientShape<T, kDim>;
  using Operands = typename Shape::Operands;
  constexpr int kSide = Shape::kSide, kThreads = Shape::kThreads, kTiles = kSide / 8;
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t q_tile = ptx::shared_address(shared), dout_tile = q_tile + Operands::kBytes;
  const uint32_t k_tile = dout_tile + Operands::kBytes, v_tile = k_tile + Operands::kBytes;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;

  float sums[kTiles][4] = {};
  ScoreSteps<kSide, V> steps(p);
  for (; !steps.done(p); steps.next(p)) {
    const int head = steps.head;
    const Sequence s(p, steps.batch);
    const Band band(p, s);
    const int first_q = steps.q * kSide, first_k = steps.k * kSide, kv_head = head / p.group;
    const int last_q = min(first_q + kSide, s.len_q) - 1;
    if (first_q >= s.len_q || first_k >= s.len_k || first_k > last_q + band.high ||
        first_k + kSide - 1 < first_q + band.low)
      continue;
    __syncthreads();
    load_tile<Operands, kThreads>(q_tile, query_matrix<const T>(p.q, s, head, p.load_dim), first_q);
    load_tile<Operands, kThreads>(dout_tile, query_matrix<const T>(p.dout, s, head, p.load_dim_v), first_q);
    load_tile<Operands, kThreads>(k_tile, key_matrix<const T>(p.k, s, kv_head, p.load_dim), first_k);
    load_tile<Operands, kThreads>(v_tile, key_matrix<const T>(p.v, s, kv_head, p.load_dim_v), first_k);
    ptx::cp_async_commit();
    ScoreGradient<T, V> gradient;
    gradient.init(p, s, head, first_q + warp_row + lane / 4);
    ptx::cp_async_wait<0>();
    __syncthreads();
    SharedOperand<Operands, 1> q, dout;
    q.init(q_tile, warp_row);
    dout.init(dout_tile, warp_row);
    float scores[1][kTiles][4], dscores[1][kTiles][4];
    clear(scores);
    multiply_rows<Operands>(scores, q, k_tile);
    fill(dscores, gradient.start);
    multiply_rows<Operands>(dscores, dout, v_tile);
    gradient.template apply<true>(p, s, head, band, scores[0], dscores[0], first_k, false);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[n][e] += dscores[0][n][e];
  }

  __syncthreads();
  float* const tile = reinterpret_cast<float*>(shared);
  const float keep_scale = V::kDropout ? p.dropout_scale : 1.0f;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      tile[(warp_row + lane / 4 + e / 2 * 8) * Shape::kSumStride + 8 * n + lane % 4 * 2 + e % 2] =
          sums[n][e] * keep_scale;
  __syncthreads();

  if (steps.diagonal) {
    for (int d = threadIdx.x; d < 2 * kSide;
         d += kThreads) {  // column - row + side - 1; the last one is empty
      float sum = 0.0f;
      for (int row = max(0, kSide - 1 - d); row < min(kSide, 2 * kSide - 1 - d); ++row)
        sum += tile[row * Shape::kSumStride + row + d - (kSide - 1)];
      p.drelative_partial[int64_t(blockIdx.x) * 2 * kSide + d] = sum;
    }
    return;
  }
  const int rows = p.dbias_q == 1 ? 1 : kSide, cols = p.dbias_k == 1 ? 1 : kSide;
  float* const out = static_cast<float*>(p.dbias.data) + steps.first_batch * p.dbias.stride_b +
                     steps.first_head * p.dbias.stride_h;
  for (int index = threadIdx.x; index < rows * cols; index += kThreads) {
    const int row = index / cols, col = index % cols;
    const int i = steps.first_q * kSide + row, j = steps.first_k * kSide + col;
    if (i >= p.dbias_q || j >= p.dbias_k) continue;
    float sum = 0.0f;
    for (int r = row; r < (rows == 1 ? kSide : row + 1); ++r)
      for (int c = col; c < (cols == 1 ? kSide : col + 1); ++c) sum += tile[r * Shape::kSumStride + c];
    out[i * p.dbias.stride_q + j * p.dbias.stride_k] = sum;
  }
}

}  // namespace fastattn
