// Gradients of keys and values: a block owns a tile of keys of one kv head and steps through the queries, of
// all query heads of its group, that see them. It alone writes its rows, so the result is deterministic.
//
// Scores are computed transposed, keys x queries: weights and score gradients then already lie in registers
// as the left operands of dv += weights * dout and dk += dscores * q.
#pragma once

#include <stddef.h>

#include "dropout.h"
#include "mask.h"
#include "matmul.h"
#include "pipeline.h"
#include "row_tile.h"
#include "tile_sizes.h"
#include "variant.h"

namespace fastattn {

// From the rows behind a head's last unmasked tile to those of the first of the next head, in elements of q
// and dout, in words of RowStatistics and in queries. Seldom needed, so kept in shared memory, not in
// registers.
struct HeadJump {
  int64_t q, dout, words;
  int queries;
};

template <typename T, int kDim, typename V>
struct KeyGradientShape {
  static constexpr KeyGradientTile kTile = key_gradient_tile(sizeof(T), kDim, V::kRelative);
  using QTile = Tile<T, kTile.block_q, kDim>;
  using KTile = Tile<T, kTile.block_k(), kDim>;
  using Keep = KeepBytes<kTile.block_q>;
  using Rows = RowTile<kTile.block_q>;
  // Bytes from stage to stage, and where the first lies in shared memory: q and dout; what their rows have.
  static constexpr int kTileBytes = stage_bytes(2 * QTile::kBytes), kRowBytes = stage_bytes(Rows::kBytes),
                       kKeepBytes = stage_bytes(Keep::kBytes + int(sizeof(HeadJump)));
  static constexpr int kTiles = 2 * KTile::kBytes, kRows = kTiles + kTile.stages * kTileBytes,
                       kKeep = kRows + kTile.stages * kRowBytes, kJump = kKeep + Keep::kBytes,
                       kSharedBytes = kKeep + kTile.stages * kKeepBytes;
  static_assert(kSharedBytes <= kSharedLimit);
  // Else there are no registers for where the tiles are copied from.
  static constexpr bool kMovesOn = sizeof(T) == 2 && (kDim <= 128 || !V::kDropout);
  // Else not even for what follows from a sequence or a thread: steps compute it anew.
  static constexpr bool kHoldsPlaces = sizeof(T) == 2 || !V::kDropout;
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

// What a block copies for a step, as one thread sees it: q, dout, and a word of their rows' statistics. Next
// to an unmasked step is one a tile further, or the first of the next head, and all its rows exist.
template <typename T, int kDim, typename V>
class QuerySource {
  using Shape = KeyGradientShape<T, kDim, V>;
  using QTile = typename Shape::QTile;
  using Rows = typename Shape::Rows;
  static constexpr int kBlockQ = Shape::kTile.block_q, kThreads = Shape::kTile.threads();
  static_assert(Rows::kCopies <= kThreads);

 public:
  int head, first_q;  // of the step copied last

  // Before a barrier.
  __device__ __forceinline__ QuerySource(uint8_t* shared, const Params& p, const HeadWalk& walk)
      : jump_(ptx::shared_address(shared + Shape::kJump)) {
    const int rows = (walk.tiles.full_end - walk.tiles.full_begin) * kBlockQ;
    if (threadIdx.x == 0)
      *reinterpret_cast<HeadJump*>(shared + Shape::kJump) = {
          p.q.stride_h - int64_t(rows) * p.q.stride_n, p.dout.stride_h - int64_t(rows) * p.dout.stride_n,
          2 * (p.rows_stride_h - rows), -rows};
  }

  // To neighbouring tiles, and a RowTile; `next` as in Pipeline.
  template <typename Next>
  __device__ __forceinline__ void load(uint32_t q_tile, uint32_t rows, const Params& p, const Sequence& s,
                                       const HeadWalk& walk, int kv_head, int step, Next next) {
    if constexpr (next.value) {
      move_on(p, walk.tiles.full_end * kBlockQ);
    } else {
      int tile;
      walk.at(step, head, tile);
      head += kv_head * p.group, first_q = tile * kBlockQ;
      q_at_.seek(query_matrix<const T>(p.q, s, head, p.load_dim), first_q);
      dout_at_.seek(query_matrix<const T>(p.dout, s, head, p.load_dim_v), first_q);
      const int index = Shape::kHoldsPlaces ? threadIdx.x : ptx::again(threadIdx.x);
      word_ = &row_statistics(p, s, head)[first_q + Rows::query(index)].lse2 + Rows::word(index);
    }
    q_at_.template load<!next.value>(q_tile, query_matrix<const T>(p.q, s, head, p.load_dim), first_q);
    dout_at_.template load<!next.value>(q_tile + QTile::kBytes,
                                        query_matrix<const T>(p.dout, s, head, p.load_dim_v), first_q);
    if (copies_) ptx::cp_async_4(rows + threadIdx.x * 4, word_, next.value || first_q + query() < s.len_q);
  }

 private:
  // Unmasked tiles end before query `end`.
  __device__ __forceinline__ void move_on(const Params& p, int end) {
    q_at_.next_tile(p.q.stride_n), dout_at_.next_tile(p.dout.stride_n);
    word_ += 2 * kBlockQ, first_q += kBlockQ;
    if (first_q < end) return;
    ++head, first_q += int(ptx::load_shared_32(jump_ + offsetof(HeadJump, queries)));
    q_at_.jump(ptx::load_shared_s64(jump_ + offsetof(HeadJump, q)));
    dout_at_.jump(ptx::load_shared_s64(jump_ + offsetof(HeadJump, dout)));
    word_ += ptx::load_shared_s64(jump_ + offsetof(HeadJump, words));
  }
  __device__ __forceinline__ static int query() { return Rows::query(threadIdx.x); }

  TileSource<QTile, kThreads, const T> q_at_, dout_at_;
  const float* word_;
  const uint32_t jump_;                                                      // where a HeadJump lies
  const bool copies_ = ptx::uniform(threadIdx.x / 32) < Rows::kCopies / 32;  // this warp
};

template <typename T, int kDim, typename V, bool kDk, bool kDv>
__global__ void __launch_bounds__(KeyGradientShape<T, kDim, V>::kTile.threads())
    key_gradient(const __grid_constant__ Params p) {
  using Shape = KeyGradientShape<T, kDim, V>;
  using QTile = typename Shape::QTile;
  using KTile = typename Shape::KTile;
  using Keep = typename Shape::Keep;
  using Rows = typename Shape::Rows;
  constexpr int kBlockQ = Shape::kTile.block_q, kBlockK = Shape::kTile.block_k();
  constexpr int kThreads = Shape::kTile.threads(), kQueryTiles = kBlockQ / 8, kOutTiles = kDim / 8;
  using Steps = Pipeline<Shape::kTile.stages>;
  using KOperand =
      std::conditional_t<Shape::kTile.k_in_registers, RegisterOperand<KTile, 1>, SharedOperand<KTile, 1>>;
  const bool want_dk = kDk && p.wants_dk != 0, want_dv = kDv && p.wants_dv != 0;

  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t k_tile = ptx::shared_address(shared), v_tile = k_tile + KTile::kBytes;
  const auto q_tile = [&](int stage) { return k_tile + Shape::kTiles + stage * Shape::kTileBytes; };
  const auto dout_tile = [&](int stage) { return q_tile(stage) + QTile::kBytes; };
  const auto rows_of = [&](int stage) { return k_tile + Shape::kRows + stage * Shape::kRowBytes; };
  const auto keep_of = [&](int stage) { return shared + Shape::kKeep + stage * Shape::kKeepBytes; };

  const Place place(ceil_div(p.len_k, kBlockK), p.kv_heads);
  const int kv_head = place.head, first_k = place.tile * kBlockK;
  Sequence s(p, place.batch);
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
  const bool all_visible = ptx::uniform(__syncthreads_and(visible[0] && visible[1]));
  const uint32_t keep_bit =
      1u << (first_k + warp_row) / kDropoutLanes % kDropoutSlots;  // of this warp's keys
  const HeadWalk walk{walk_queries<kBlockQ>(s, band, first_k, kBlockK, all_visible), p.group};

  QuerySource<T, kDim, V> source(shared, p, walk);
  const auto load = [&](int step, int stage, auto next) {
    source.load(q_tile(stage), rows_of(stage), p, s, walk, kv_head, step, next);
    if constexpr (V::kDropout) {
      if (p.dropout_threshold > 0)
        Keep::template fill<kThreads>(keep_of(stage), DropoutStream(p, source.head, s.batch), source.first_q,
                                      Shape::kHoldsPlaces ? first_k : ptx::uniform(first_k));
    }
  };

  KOperand k, v;
  float dk[1][kOutTiles][4], dv[1][kOutTiles][4];
  clear(dk);
  clear(dv);

  const auto step_over = [&](int step, auto masked) {
    if constexpr (!Shape::kHoldsPlaces)
      s.batch = ptx::uniform(s.batch), s.first_q = ptx::uniform(int(s.first_q));
    const int stage =
        Steps::begin(step, walk.count(), std::bool_constant < !masked.value && Shape::kMovesOn > {}, load);
    int h, tile;
    walk.at(step, h, tile);
    const int first_q = tile * kBlockQ;
    const ScoreTransform<T, V> transform(p, s, kv_head * p.group + h);

    const uint32_t rows = Rows::quad(rows_of(stage));
    float weights[1][kQueryTiles][4], dscores[1][kQueryTiles][4];
    clear(weights);
    multiply_rows<QTile>(weights, k, q_tile(stage));
    if (want_dk) {
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n) Rows::minus_delta(dscores[0][n], rows, n);
      multiply_rows<QTile>(dscores, v, dout_tile(stage));
    }
    float lse2[2][2];
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n) {
      if (n % 2 == 0) Rows::lse2(lse2, rows, n);
      float start[4] = {};  // of dscores: what is left of one where the weight is dropped
      if (V::kDropout && kDk) Rows::minus_delta(start, rows, n);
      const int query = 8 * n + lane % 4 * 2;  // this lane's queries: this one and query + 1
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t kept = 0;
        if constexpr (V::kDropout) kept = Keep::pair(keep_of(stage), query, lane / 4 + 8 * half);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& weight = weights[0][n][2 * half + e];
          float& dscore = dscores[0][n][2 * half + e];
          const int i = first_q + query + e, j = key + 8 * half;
          float derivative;
          weight =
              ptx::exp2(transform.template apply<!masked.value>(weight, i, j, derivative) - lse2[n % 2][e]);
          const bool keeps = !V::kDropout || (kept & keep_bit << 8 * e) != 0;
          if (want_dk) dscore = weight * (keeps ? dscore : start[e]) * derivative;
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
  if (V::kDropout && p.dropout_threshold == 0)
    for (int stage = 0; stage < Shape::kTile.stages; ++stage)
      Keep::template keep_all<kThreads>(keep_of(stage));
  ptx::cp_async_wait<1>();
  __syncthreads();
  k.init(k_tile, warp_row);
  v.init(v_tile, warp_row);
  int step = 0;
  for (; step < walk.masked(); ++step) step_over(step, std::true_type{});
  for (; step < walk.count(); ++step) step_over(step, std::false_type{});

  // A warp's rows of the k and v tiles are its own: they take its results on the way out.
  const float keep_scale = V::kDropout ? p.dropout_scale : 1.0f, dk_scale = p.scale * keep_scale;
  if (kDk) store_accumulators<KTile>(k_tile, warp_row, dk[0], dk_scale, dk_scale);
  if (kDv) store_accumulators<KTile>(v_tile, warp_row, dv[0], keep_scale, keep_scale);
  __syncwarp();
  // Where they go is computed anew: kept since the beginning it would cost the loops registers.
  int tiles = ceil_div(p.len_k, kBlockK);
  ptx::pin(tiles);
  const Place to(tiles, p.kv_heads);
  const Sequence rows(p, to.batch);
  const int to_k = to.tile * kBlockK;
  if (want_dk) store_rows<KTile, 16>(k_tile, warp_row, key_matrix<T>(p.dk, rows, to.head, p.dim), to_k);
  if (want_dv) store_rows<KTile, 16>(v_tile, warp_row, key_matrix<T>(p.dv, rows, to.head, p.dim_v), to_k);
}

}  // namespace fastattn
