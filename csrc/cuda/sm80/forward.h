// Attention forward: a block owns a tile of queries of one head and steps through the keys they see.
#pragma once

#include "careful.h"
#include "dropout.h"
#include "pipeline.h"
#include "softmax.h"
#include "tile_sizes.h"
#include "variant.h"

namespace fastattn {

template <typename T, int kDim, typename V>
struct ForwardShape {
  static constexpr ForwardTile kTile =
      forward_tile(sizeof(T), kDim, !V::kTransforms && !V::kDropout, V::kBias);
  using QTile = Tile<T, kTile.block_q(), kDim>;
  using KTile = Tile<T, kTile.block_k, kDim>;
  static constexpr int kStageBytes = 2 * KTile::kBytes;
  static constexpr int kNotesOffset = QTile::kBytes + 2 * kStageBytes;
  // What the loops hold. Where registers run out, which of these to do without was found by counting words of
  // local memory (none, says test_built_library.py); elsewhere holding a value is cheapest.
  static constexpr bool kMovesOn = sizeof(T) == 2 && !V::kPosition;  // where the tiles are copied from
  // Else, in the masked steps, of which there are few, what follows from a row or a head is computed anew.
  static constexpr bool kHoldsRows = sizeof(T) == 4 || !V::kBias || kDim <= 64,
                        kHoldsHead = kHoldsRows || kDim > 128;
  // Else these wait in shared memory between the loops.
  static constexpr bool kHoldsKeyPointers = kMovesOn || !kHoldsHead;
  static constexpr int kPointersOffset = kNotesOffset + Cleaner<KTile>::kBytes;
  static constexpr int kSharedBytes = kPointersOffset + (kHoldsKeyPointers ? 0 : int(sizeof(KeyPointers)));
  static_assert(kSharedBytes <= kSharedLimit && kPointersOffset % alignof(KeyPointers) == 0);
};

template <typename T, int kDim, typename V>
__global__ void __launch_bounds__(ForwardShape<T, kDim, V>::kTile.threads())
    forward(const __grid_constant__ Params p) {
  using Shape = ForwardShape<T, kDim, V>;
  using QTile = typename Shape::QTile;
  using KTile = typename Shape::KTile;
  constexpr int kM = Shape::kTile.m, kBlockQ = Shape::kTile.block_q(), kBlockK = Shape::kTile.block_k;
  constexpr int kThreads = Shape::kTile.threads(), kKeyTiles = kBlockK / 8, kValueTiles = kDim / 8;
  using CleanV = Cleaner<KTile>;
  using QOperand =
      std::conditional_t<Shape::kTile.q_in_registers, RegisterOperand<QTile, kM>, SharedOperand<QTile, kM>>;

  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t q_tile = ptx::shared_address(shared), stages = q_tile + QTile::kBytes;
  uint32_t* notes = reinterpret_cast<uint32_t*>(shared + Shape::kNotesOffset);
  KeyPointers* const pointers = reinterpret_cast<KeyPointers*>(shared + Shape::kPointersOffset);
  const auto k_tile = [&](int stage) { return stages + stage * Shape::kStageBytes; };
  const auto v_tile = [&](int stage) { return stages + stage * Shape::kStageBytes + KTile::kBytes; };

  // Blocks with the most keys under a causal mask come first in the grid.
  const int q_tiles = ceil_div(p.len_q, kBlockQ);
  const Place place(q_tiles * p.splits, p.heads);
  const int head = place.head;
  const int first_q = (q_tiles - 1 - place.tile / p.splits) * kBlockQ;
  const Sequence s(p, place.batch);
  if (first_q >= s.len_q) return;
  const Band band(p, s);
  TileWalk walk = walk_keys<kBlockK>(p, s, band, first_q, kBlockQ);
  walk.take_split(place.tile % p.splits, p.splits);

  KeySource<KTile, kThreads> source(p, s, head / p.group);
  const auto load = [&](int step, int stage, auto next) { source.load(k_tile(stage), walk, step, next); };

  const int warp_row = threadIdx.x / 32 * kM * 16, lane = threadIdx.x % 32;
  const int row = first_q + warp_row + lane / 4;  // this lane's first query
  const float exponent_scale = V::kTransforms ? 1.0f : p.scale_log2;

  QOperand q;
  float out[kM][kValueTiles][4];
  OnlineSoftmax<kM> softmax;

  const auto step_over = [&](int step, auto masked, auto careful) {
    const int stage = Pipeline<2>::begin(step, walk.count(),
                                         std::bool_constant < !masked.value && Shape::kMovesOn > {}, load);
    const int first_k = walk.at(step) * kBlockK;
    if constexpr (careful.value) {
      CleanV::template clean<kThreads>(v_tile(stage), notes);
      __syncthreads();
    }
    Sequence own = s;  // and what follows: as this step takes them, see kHoldsRows
    int own_head = head, own_row = row;
    if constexpr (masked.value && !Shape::kHoldsRows)
      own.batch = ptx::uniform(s.batch), own_row = ptx::again(row);
    if constexpr (masked.value && !Shape::kHoldsHead) own_head = ptx::uniform(head);
    float scores[kM][kKeyTiles][4];
    clear(scores);
    multiply_rows<KTile>(scores, q, k_tile(stage));
    if constexpr (V::kTransforms) {
      const ScoreTransform<T, V> transform(p, own, own_head);
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = own_row + 16 * m + e / 2 * 8, j = first_k + 8 * n + lane % 4 * 2 + e % 2;
            float derivative;
            scores[m][n][e] = transform.template apply<!masked.value>(scores[m][n][e], i, j, derivative);
          }
    }
    if constexpr (masked.value) {
      const KeyBits<kBlockK> keys(p, own, first_k);
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int i = own_row + 16 * m + e / 2 * 8, key = 8 * n + lane % 4 * 2 + e % 2;
            if (!keys.test(key) || !band.contains(i, first_k + key)) scores[m][n][e] = -INFINITY;
          }
    }
    softmax.update(scores, out, exponent_scale);
    if constexpr (V::kDropout) {
      if (p.dropout_threshold > 0) {
        const DropoutStream stream(p, own_head, own.batch);
#pragma unroll
        for (int m = 0; m < kM; ++m)
          visit_dropout<kKeyTiles>(stream, own_row + 16 * m, first_k, [&](int n, int e, bool keep) {
            scores[m][n][e] = keep ? scores[m][n][e] : 0.0f;
          });
      }
    }
    multiply_sum<KTile>(out, scores, v_tile(stage));
    if constexpr (careful.value)
      CleanV::spoil(out, notes, KeyBits<kBlockK>(p, own, first_k), band, own_row, first_k);
  };

  const std::true_type yes;
  const std::false_type no;
  load_tile<QTile, kThreads>(q_tile, query_matrix<const T>(p.q, s, head, p.load_dim), first_q);
  ptx::cp_async_commit();
  Pipeline<2>::start(walk.count(), load);
  if constexpr (!Shape::kHoldsKeyPointers) source.keep(pointers);
  ptx::cp_async_wait<1>();
  __syncthreads();
  q.init(q_tile, warp_row);
  clear(out);
  softmax.init();
  int step = 0;
  for (; step < walk.masked(); ++step) step_over(step, yes, no);
  if constexpr (!Shape::kHoldsKeyPointers) source.recall(pointers);
  for (; step < walk.count(); ++step) step_over(step, no, no);
  if (__syncthreads_or(!all_finite(out))) {
    // NaN or infinity among the values of keys that are masked for some rows, perhaps: see careful.h.
    walk.mask_all();
    if constexpr (!Shape::kHoldsKeyPointers) source.recall(pointers);
    Pipeline<2>::start(walk.count(), load);
    clear(out);
    softmax.init();
    for (step = 0; step < walk.count(); ++step) step_over(step, yes, yes);
  }

  // Epilogue. A warp's rows of the q tile are its own: they take its results on the way out. Where these go
  // is computed anew: kept since the beginning it would cost the loops registers.
  int splits = p.splits;
  ptx::pin(splits);
  const int out_tiles = ceil_div(p.len_q, kBlockQ);
  const Place to(out_tiles * splits, p.heads);
  const Sequence rows(p, to.batch);
  const int split = to.tile % splits, to_q = (out_tiles - 1 - to.tile / splits) * kBlockQ;
  const int to_row = to_q + warp_row + lane / 4;
  const float keep_scale = V::kDropout ? p.dropout_scale : 1.0f;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    float inverse[2], lse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      softmax.finish(m, half, inverse[half], lse[half]);
      const int i = to_row + 16 * m + 8 * half;
      inverse[half] *= keep_scale;
      if (splits == 1 && p.lse.data != nullptr && lane % 4 == 0 && i < rows.len_q)
        row_pointer(p.lse, rows, to.head)[i] = lse[half];
    }
    if (splits == 1) {
      store_accumulators<QTile>(q_tile, warp_row + 16 * m, out[m], inverse[0], inverse[1]);
      continue;
    }
    // Partial results of a split go out as they are, in fp32; auxiliary.cu merges them.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = to_row + 16 * m + 8 * half;
      if (i >= rows.len_q) continue;
      const int64_t at = ((int64_t(split) * p.batch + rows.batch) * p.heads + to.head) * p.len_q + i;
      if (lane % 4 == 0) p.partial_lse[at] = lse[half];
#pragma unroll
      for (int n = 0; n < kValueTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int col = 8 * n + lane % 4 * 2 + e;
          if (col < p.dim_v) p.partial_out[at * p.dim_v + col] = out[m][n][2 * half + e] * inverse[half];
        }
    }
  }
  if (splits == 1) {
    __syncwarp();
    const auto out_matrix = query_matrix<T>(p.out, rows, to.head, p.dim_v);
    store_rows<QTile, kM * 16>(q_tile, warp_row, out_matrix, to_q);
  }
}

}  // namespace fastattn
