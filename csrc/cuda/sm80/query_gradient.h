// Gradient of queries: a block owns a tile of queries of one head and steps through the keys they see, as
// forward does.
#pragma once

#include "careful.h"
#include "dropout.h"
#include "pipeline.h"
#include "tile_sizes.h"
#include "variant.h"

namespace fastattn {

// What the gradient of a tile's scores is made of, for the lane's rows i and i + 8 of one 16-row strip.
template <typename T, typename V>
struct ScoreGradient {
  float lse2[2];
  float start[4];  // of an accumulator tile's elements: RowStatistics::minus_delta
  int row;

  __device__ __forceinline__ void init(const Params& p, const Sequence& s, int head, int first_row) {
    row = first_row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = row + 8 * half;
      const bool inside = i < s.len_q;
      const RowStatistics r = inside ? row_statistics(p, s, head)[i] : RowStatistics{INFINITY, 0.0f};
      lse2[half] = r.lse2, start[2 * half] = r.minus_delta;
      // A copy that ptxas does not know to be one: the four stay in registers that a product can start from.
      start[2 * half + 1] = __shfl_sync(0xffffffffu, r.minus_delta, threadIdx.x % 32);
    }
  }

  // scores (q * k) and dweights (dout * v, added to `start`) of keys first_k on; dweights becomes the
  // gradient of the scores before softcap, but for dropout's scale. With kMasked, elements outside the band
  // or of keys not in `keys` give 0.
  template <bool kMasked, int kTiles>
  __device__ __forceinline__ void apply(const Params& p, const Sequence& s, int head, const Band& band,
                                        const float (&scores)[kTiles][4], float (&dweights)[kTiles][4],
                                        int first_k, bool with_derivative = true) const {
    const ScoreTransform<T, V> transform(p, s, head);
    const int lane = threadIdx.x % 32;
    if constexpr (V::kDropout) {
      if (p.dropout_threshold > 0)
        visit_dropout<kTiles>(DropoutStream(p, head, s.batch), row, first_k, [&](int n, int e, bool keep) {
          dweights[n][e] = keep ? dweights[n][e] : start[e];
        });
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int half = e / 2, i = row + 8 * half, j = first_k + 8 * n + lane % 4 * 2 + e % 2;
        float derivative = 1.0f;
        const float weight =
            ptx::exp2(transform.template apply<!kMasked>(scores[n][e], i, j, derivative) - lse2[half]);
        dweights[n][e] *= weight;
        if (V::kSoftcap && with_derivative) dweights[n][e] *= derivative;
      }
    if constexpr (kMasked) {
      const KeyBits<8 * kTiles> keys(p, s, first_k);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = row + e / 2 * 8, k = 8 * n + lane % 4 * 2 + e % 2;
          if (!keys.test(k) || !band.contains(i, first_k + k)) dweights[n][e] = 0.0f;
        }
    }
  }
};

template <typename T, int kDim, typename V>
struct QueryGradientShape {
  static constexpr QueryGradientTile kTile = query_gradient_tile(sizeof(T), kDim, V::kBias);
  using QTile = Tile<T, kTile.block_q(), kDim>;
  using KTile = Tile<T, kTile.block_k, kDim>;
  static constexpr int kStageBytes = stage_bytes(2 * KTile::kBytes);
  static constexpr int kNotesOffset = 2 * QTile::kBytes + kTile.stages * kStageBytes;
  static constexpr int kSharedBytes = kNotesOffset + Cleaner<KTile>::kBytes;
  static_assert(kSharedBytes <= kSharedLimit);
};

template <typename T, int kDim, typename V>
__global__ void __launch_bounds__(QueryGradientShape<T, kDim, V>::kTile.threads())
    query_gradient(const __grid_constant__ Params p) {
  using Shape = QueryGradientShape<T, kDim, V>;
  using QTile = typename Shape::QTile;
  using KTile = typename Shape::KTile;
  using CleanK = Cleaner<KTile>;
  using Steps = Pipeline<Shape::kTile.stages>;
  constexpr int kBlockQ = Shape::kTile.block_q(), kBlockK = Shape::kTile.block_k;
  constexpr int kThreads = Shape::kTile.threads(), kKeyTiles = kBlockK / 8, kOutTiles = kDim / 8;
  using QOperand =
      std::conditional_t<Shape::kTile.q_in_registers, RegisterOperand<QTile, 1>, SharedOperand<QTile, 1>>;

  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t q_tile = ptx::shared_address(shared), dout_tile = q_tile + QTile::kBytes;
  uint32_t* notes = reinterpret_cast<uint32_t*>(shared + Shape::kNotesOffset);
  const auto k_tile = [&](int stage) { return dout_tile + QTile::kBytes + stage * Shape::kStageBytes; };
  const auto v_tile = [&](int stage) { return k_tile(stage) + KTile::kBytes; };

  const int q_tiles = ceil_div(p.len_q, kBlockQ);
  const Place place(q_tiles, p.heads);
  const int head = place.head, first_q = (q_tiles - 1 - place.tile) * kBlockQ;
  const Sequence s(p, place.batch);
  if (first_q >= s.len_q) return;
  const Band band(p, s);
  TileWalk walk = walk_keys<kBlockK>(p, s, band, first_q, kBlockQ);
  const int warp_row = threadIdx.x / 32 * 16, row = first_q + warp_row + threadIdx.x % 32 / 4;

  KeySource<KTile, kThreads> source(p, s, head / p.group);
  const auto load = [&](int step, int stage, auto next) { source.load(k_tile(stage), walk, step, next); };

  QOperand q, dout;
  ScoreGradient<T, V> gradient;
  float dq[1][kOutTiles][4];

  const auto step_over = [&](int step, auto masked, auto careful) {
    const int stage =
        Steps::begin(step, walk.count(), std::bool_constant < !masked.value && sizeof(T) == 2 > {}, load);
    const int first_k = walk.at(step) * kBlockK;
    float scores[1][kKeyTiles][4], dscores[1][kKeyTiles][4];
    clear(scores);
    multiply_rows<KTile>(scores, q, k_tile(stage));
    fill(dscores, gradient.start);
    multiply_rows<KTile>(dscores, dout, v_tile(stage));
    gradient.template apply<masked.value>(p, s, head, band, scores[0], dscores[0], first_k);
    if constexpr (careful.value) {
      __syncthreads();
      CleanK::template clean<kThreads>(k_tile(stage), notes);
      __syncthreads();
    }
    multiply_sum<KTile>(dq, dscores, k_tile(stage));
    if constexpr (careful.value)
      CleanK::spoil(dq, notes, KeyBits<kBlockK>(p, s, first_k), band, row, first_k);
  };

  const std::true_type yes;
  const std::false_type no;
  load_tile<QTile, kThreads>(q_tile, query_matrix<const T>(p.q, s, head, p.load_dim), first_q);
  load_tile<QTile, kThreads>(dout_tile, query_matrix<const T>(p.dout, s, head, p.load_dim_v), first_q);
  ptx::cp_async_commit();
  Steps::start(walk.count(), load);
  gradient.init(p, s, head, row);
  ptx::cp_async_wait<1>();
  __syncthreads();
  q.init(q_tile, warp_row);
  dout.init(dout_tile, warp_row);
  clear(dq);
  int step = 0;
  for (; step < walk.masked(); ++step) step_over(step, yes, no);
  for (; step < walk.count(); ++step) step_over(step, no, no);
  if (__syncthreads_or(!all_finite(dq))) {
    // NaN or infinity among keys that are masked for some rows, perhaps: see careful.h.
    walk.mask_all();
    Steps::start(walk.count(), load);
    clear(dq);
    for (step = 0; step < walk.count(); ++step) step_over(step, yes, yes);
  }

  const float dq_scale = V::kDropout ? p.scale * p.dropout_scale : p.scale;
  store_accumulators<QTile>(q_tile, warp_row, dq[0], dq_scale, dq_scale);
  __syncwarp();
  store_rows<QTile, 16>(q_tile, warp_row, query_matrix<T>(p.dq, s, head, p.dim), first_q);
}

}  // namespace fastattn
