// Gradients of keys and values: a block owns a tile of keys of one kv head and steps through the queries, of
// all query heads of its group, that see them. It alone writes its rows, so the result is deterministic.
//
// Scores are computed transposed, keys x queries: weights and score gradients then already lie in registers
// as the left operands of dv += weights * dout and dk += dscores * q.
#pragma once

#include "dropout.h"
#include "mask.h"
#include "matmul.h"
#include "pipeline.h"
#include "tile_sizes.h"
#include "variant.h"

namespace fastattn {

template <typename T, int kDim>
struct KeyGradientShape {
  static constexpr KeyGradientTile kTile = key_gradient_tile(sizeof(T), kDim);
  using QTile = Tile<T, kTile.block_q, kDim>;
  using KTile = Tile<T, kTile.block_k(), kDim>;
  using Keep = KeepBytes<kTile.block_q>;
  static constexpr int kRowBytes = kTile.block_q * int(sizeof(RowStatistics));
  static constexpr int kRowsOffset = 2 * QTile::kBytes;
  static constexpr int kKeepOffset = kRowsOffset + kRowBytes;
  static constexpr int kStageBytes = (kKeepOffset + Keep::kBytes + 127) / 128 * 128;
  static constexpr int kSharedBytes = 2 * KTile::kBytes + kTile.stages * kStageBytes;
  static_assert(kSharedBytes <= kSharedLimit);
};

// The steps of a block: all masked tiles of every head of the group, then all others.
struct HeadWalk {
  TileWalk tiles;
  int group;
  __device__ __forceinline__ int masked() const { return tiles.masked() * group; }
  __device__ __forceinline__ int count() const { return tiles.count() * group; }
  __device__ __forceinline__ void at(int step, int& head, int& tile) const {
    const int skipped = step < masked() ? 0 : tiles.masked();
    const int width = step < masked() ? tiles.masked() : tiles.count() - tiles.masked();
    const int local = step < masked() ? step : step - masked();
    head = local / width;
    tile = tiles.at(skipped + local - head * width);
  }
};

template <typename T, int kDim, typename V, bool kDk, bool kDv>
__global__ void __launch_bounds__(KeyGradientShape<T, kDim>::kTile.threads())
    key_gradient(const __grid_constant__ Params p) {
  using Shape = KeyGradientShape<T, kDim>;
  using QTile = typename Shape::QTile;
  using KTile = typename Shape::KTile;
  using Keep = typename Shape::Keep;
  constexpr int kBlockQ = Shape::kTile.block_q, kBlockK = Shape::kTile.block_k();
  constexpr int kThreads = Shape::kTile.threads(), kQueryTiles = kBlockQ / 8, kOutTiles = kDim / 8;
  using Steps = Pipeline<Shape::kTile.stages>;
  using KOperand =
      std::conditional_t<Shape::kTile.k_in_registers, RegisterOperand<KTile, 1>, SharedOperand<KTile, 1>>;
  const bool want_dk = kDk && p.dk.data != nullptr, want_dv = kDv && p.dv.data != nullptr;

  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t k_tile = ptx::shared_address(shared), v_tile = k_tile + KTile::kBytes;
  uint8_t* const stages = shared + 2 * KTile::kBytes;
  const auto q_tile = [&](int stage) { return v_tile + KTile::kBytes + stage * Shape::kStageBytes; };
  const auto dout_tile = [&](int stage) { return q_tile(stage) + QTile::kBytes; };

  const Place place(ceil_div(p.len_k, kBlockK), p.kv_heads);
  const int kv_head = place.head, first_k = place.tile * kBlockK;
  const Sequence s(p, place.batch);
  if (first_k >= s.len_k) return;
  const Band band(p, s);
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  const int key = first_k + warp_row + lane / 4;  // this lane's keys: this one and key + 8
  bool visible[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int j = key + 8 * half;
    visible[half] =
        j < s.len_k && (p.key_mask == nullptr || p.key_mask[s.batch * p.key_mask_stride_b + j] != 0);
  }
  const bool all_visible = __syncthreads_and(visible[0] && visible[1]);
  const HeadWalk walk{walk_queries<kBlockQ>(s, band, first_k, kBlockK, all_visible), p.group};

  const auto load = [&](int step, int stage) {
    int h, tile;
    walk.at(step, h, tile);
    const int head = kv_head * p.group + h, first_q = tile * kBlockQ;
    load_tile<QTile, kThreads>(q_tile(stage), query_matrix<const T>(p.q, s, head, p.load_dim), first_q);
    load_tile<QTile, kThreads>(dout_tile(stage), query_matrix<const T>(p.dout, s, head, p.load_dim_v),
                               first_q);
    if (threadIdx.x < kBlockQ) {
      const int i = first_q + threadIdx.x;
      ptx::cp_async_8(q_tile(stage) + Shape::kRowsOffset + threadIdx.x * int(sizeof(RowStatistics)),
                      row_statistics(p, s, head) + i, i < s.len_q);
    }
    if constexpr (V::kDropout) {
      if (p.dropout_threshold > 0)
        Keep::template fill<kThreads>(stages + stage * Shape::kStageBytes + Shape::kKeepOffset,
                                      DropoutStream(p, head, s.batch), first_q, first_k);
    }
  };

  KOperand k, v;
  float dk[1][kOutTiles][4], dv[1][kOutTiles][4];
  clear(dk);
  clear(dv);

  const auto step_over = [&](int step, auto masked) {
    const int stage = Steps::begin(step, walk.count(), load);
    int h, tile;
    walk.at(step, h, tile);
    const int first_q = tile * kBlockQ;
    const ScoreTransform<T, V> transform(p, s, kv_head * p.group + h);

    float weights[1][kQueryTiles][4], dscores[1][kQueryTiles][4];
    clear(weights);
    multiply_rows<QTile>(weights, k, q_tile(stage));
    if (want_dk) {
      clear(dscores);
      multiply_rows<QTile>(dscores, v, dout_tile(stage));
    }
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n) {
      const int query = 8 * n + lane % 4 * 2;  // this lane's queries: this one and query + 1
      const uint4 rows =
          ptx::load_shared_128(q_tile(stage) + Shape::kRowsOffset + query * int(sizeof(RowStatistics)));
      const float lse2[2] = {__uint_as_float(rows.x), __uint_as_float(rows.z)};
      const float delta[2] = {__uint_as_float(rows.y), __uint_as_float(rows.w)};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t kept = 0x0101;
        if constexpr (V::kDropout) {
          if (p.dropout_threshold > 0)
            kept = Keep::pair(stages + stage * Shape::kStageBytes + Shape::kKeepOffset, query,
                              lane / 4 + 8 * half, (first_k + warp_row) / kDropoutLanes % kDropoutSlots);
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& weight = weights[0][n][2 * half + e];
          float& dscore = dscores[0][n][2 * half + e];
          const int i = first_q + query + e, j = key + 8 * half;
          float derivative;
          weight = ptx::exp2(transform.template apply<!masked.value>(weight, i, j, derivative) - lse2[e]);
          const bool keeps = !V::kDropout || (kept >> (8 * e) & 1);
          if (want_dk) {
            const float dweight = V::kDropout ? (keeps ? dscore * p.dropout_scale : 0.0f) : dscore;
            dscore = weight * (dweight - delta[e]) * derivative;
          }
          if (V::kDropout && !keeps) weight = 0.0f;
          if (masked.value && !(visible[half] && band.contains(i, j))) {
            weight = 0.0f;
            dscore = 0.0f;
          }
        }
      }
    }
    if (want_dv) multiply_sum<QTile>(dv, weights, dout_tile(stage));
    if (want_dk) multiply_sum<QTile>(dk, dscores, q_tile(stage));
  };

  load_tile<KTile, kThreads>(k_tile, key_matrix<const T>(p.k, s, kv_head, p.load_dim), first_k);
  load_tile<KTile, kThreads>(v_tile, key_matrix<const T>(p.v, s, kv_head, p.load_dim_v), first_k);
  ptx::cp_async_commit();
  Steps::start(walk.count(), load);
  ptx::cp_async_wait<1>();
  __syncthreads();
  k.init(k_tile, warp_row);
  v.init(v_tile, warp_row);
  int step = 0;
  for (; step < walk.masked(); ++step) step_over(step, std::true_type{});
  for (; step < walk.count(); ++step) step_over(step, std::false_type{});

  // A warp's rows of the k and v tiles are its own: they take its results on the way out.
  const float dv_scale = V::kDropout ? p.dropout_scale : 1.0f;
  if (kDk) store_accumulators<KTile>(k_tile, warp_row, dk[0], p.scale, p.scale);
  if (kDv) store_accumulators<KTile>(v_tile, warp_row, dv[0], dv_scale, dv_scale);
  __syncwarp();
  if (want_dk) store_rows<KTile, 16>(k_tile, warp_row, key_matrix<T>(p.dk, s, kv_head, p.dim), first_k);
  if (want_dv) store_rows<KTile, 16>(v_tile, warp_row, key_matrix<T>(p.dv, s, kv_head, p.dim_v), first_k);
}

}  // namespace fastattn
