// Gradients of keys and values on Hopper: a block owns 128 keys of one kv head and steps through the queries,
// of all query heads of its group, that see them. As in sm80/key_gradient.h, scores are computed transposed,
// so that weights and score gradients already lie in registers as left operands.
//
// The products of a step run while the next step's scores are issued, and the weights are computed while v
// dout^T runs.
#pragma once

#include "../sm80/key_gradient.h"
#include "query_block.h"

namespace fastattn::sm90 {

template <typename T, int kDim, bool kDk, bool kDv>
struct KeyGradientShape {
  static_assert(kDim <= 128 || !(kDk && kDv), "registers hold 256 columns of one gradient");
  static constexpr int kBlockQ = 64, kBlockK = 128;
  static constexpr bool kValuesNeeded = kDk;  // for the gradient of the weights
  // Without dv a step is done with its tile of dout early (step_over), and one stage is enough where shared
  // memory holds no more.
  using QueryRing = Ring<2>;
  using DoutRing = Ring<kDim <= 128 || kDv ? 2 : 1>;
  static constexpr bool kDoutsEarly = !kDv;  // given back before the queries, else by the same arrival
  static_assert(kDoutsEarly || DoutRing::kStages == QueryRing::kStages);
  using QTile = Tile<T, kBlockQ, kDim>;
  using KTile = Tile<T, kBlockK, kDim>;
  using Rows = RowTile<kBlockQ>;
  // Offsets in shared memory.
  static constexpr int kOwnBytes = (kValuesNeeded ? 2 : 1) * KTile::kBytes, kValues = KTile::kBytes,
                       kQueries = kOwnBytes, kDouts = kQueries + QueryRing::kStages * QTile::kBytes,
                       kRows = kDouts + DoutRing::kStages * QTile::kBytes,
                       kBarriers = kRows + QueryRing::kStages * Rows::kBytes,
                       kSharedBytes = kBarriers + 8 + QueryRing::kBytes + DoutRing::kBytes;
  static_assert(kSharedBytes <= 227 * 1024);
};

// Where a block is at work, known to producer and consumers alike.
template <typename Shape>
struct KeyBlock {
  const Params& p;
  int kv_head, first_k;
  Sequence s;
  Band band;
  HeadWalk walk;
  uint32_t shared;

  __device__ __forceinline__ KeyBlock(const Params& params, const Place& place, uint32_t base)
      : p(params),
        kv_head(place.head),
        first_k(place.tile * Shape::kBlockK),
        s(p, place.batch),
        band(p, s),
        shared(base) {}
  __device__ __forceinline__ void set_walk(bool all_keys_visible) {
    walk = {walk_queries<Shape::kBlockQ>(s, band, first_k, Shape::kBlockK, all_keys_visible), p.group};
  }
  __device__ __forceinline__ void at(int step, int& head, int& first_q) const {
    int tile;
    walk.at(step, head, tile);
    head += kv_head * p.group, first_q = tile * Shape::kBlockQ;
  }

  __device__ __forceinline__ uint32_t own_barrier() const { return shared + Shape::kBarriers; }
  __device__ __forceinline__ typename Shape::QueryRing queries() const { return {own_barrier() + 8}; }
  __device__ __forceinline__ typename Shape::DoutRing douts() const {
    return {own_barrier() + 8 + Shape::QueryRing::kBytes};
  }
  __device__ __forceinline__ uint32_t query_tile(int n) const {
    return shared + Shape::kQueries + Shape::QueryRing::stage(n) * Shape::QTile::kBytes;
  }
  __device__ __forceinline__ uint32_t dout_tile(int n) const {
    return shared + Shape::kDouts + Shape::DoutRing::stage(n) * Shape::QTile::kBytes;
  }
  __device__ __forceinline__ uint32_t rows(int n) const {
    return shared + Shape::kRows + Shape::QueryRing::stage(n) * Shape::Rows::kBytes;
  }
};

// One warp: tiles by TMA, and the statistics of their rows, which no copy could cut off at a sequence's end.
// Queries beyond it get weight exp2(-inf) = 0.
template <typename Shape>
__device__ __forceinline__ void produce(const MappedParams& x, const KeyBlock<Shape>& block) {
  using QTile = typename Shape::QTile;
  const int lane = threadIdx.x % 32, batch = block.s.batch;
#pragma unroll 1
  for (int step = 0; step < block.walk.count(); ++step) {
    int head, first_q;
    block.at(step, head, first_q);
    const int64_t row = block.s.first_q + first_q;
    block.queries().wait_free(step);
    if (lane == 0)
      load_panels<QTile>(block.query_tile(step), x.q, block.queries().announce(step, QTile::kBytes), row,
                         head, batch);
    const RowStatistics* rows = row_statistics(x.params, block.s, head);
    const int i = first_q + 2 * lane;
    const RowStatistics none{INFINITY, 0.0f};
    const RowStatistics first = i < block.s.len_q ? rows[i] : none,
                        second = i + 1 < block.s.len_q ? rows[i + 1] : none;
    Shape::Rows::store(block.rows(step), lane, first, second);
    block.queries().arrive(step);
    if constexpr (Shape::kDoutsEarly) block.douts().wait_free(step);
    if (lane == 0)
      load_panels<QTile>(block.dout_tile(step), x.dout, block.douts().announce(step, QTile::kBytes), row,
                         head, batch);
  }
}

template <typename T, int kDim, bool kDk, bool kDv>
struct KeyGradientConsumer {
  using Shape = KeyGradientShape<T, kDim, kDk, kDv>;
  using QTile = typename Shape::QTile;
  using KTile = typename Shape::KTile;
  using Rows = typename Shape::Rows;
  static constexpr int kQueryTiles = Shape::kBlockQ / 8, kOutTiles = kDim / 8;

  const Params& p;
  const KeyBlock<Shape>& block;
  const uint64_t k, v;  // descriptors of its 64 rows
  const int key;        // this lane's keys: this one and key + 8
  const bool (&visible)[2];
  float weights[kQueryTiles][4], dscores[kQueryTiles][4];
  float dk[1][kOutTiles][4], dv[1][kOutTiles][4];
  Operand left[kQueryTiles / 2], dleft[kQueryTiles / 2];

  __device__ __forceinline__ KeyGradientConsumer(const KeyBlock<Shape>& b, uint32_t group, int first_key,
                                                 const bool (&keys_visible)[2])
      : p(b.p),
        block(b),
        k(KTile::rows_descriptor(b.shared + group * 64 * 128)),
        v(KTile::rows_descriptor(b.shared + Shape::kValues + group * 64 * 128)),
        key(first_key),
        visible(keys_visible) {}

  // In the packed layout a tile goes on with the next sequence's rows. Their weights are 0, but 0 times NaN
  // is not.
  __device__ __forceinline__ void clear_tail(int n) const {
    int head, first_q;
    block.at(n, head, first_q);
    const int rows = block.s.len_q - first_q;
    if (p.cu_q == nullptr || rows >= Shape::kBlockQ) return;
    block.douts().wait(n);
    for (int at = rows * QTile::kChunks + threadIdx.x; at < Shape::kBlockQ * QTile::kChunks;
         at += kConsumers) {
      const uint32_t offset = QTile::offset(at / QTile::kChunks, at % QTile::kChunks);
      ptx::store_shared_128(block.query_tile(n) + offset, {});
      ptx::store_shared_128(block.dout_tile(n) + offset, {});
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(kAllConsumers, kConsumers);
  }

  // Scores become weights, and dscores, from the gradient of the weights less delta, that of the scores.
  __device__ __forceinline__ void weigh(int n) {
    const uint32_t rows = Rows::quad(block.rows(n));
    float lse2[2][2];
#pragma unroll
    for (int t = 0; t < kQueryTiles; ++t) {
      if (t % 2 == 0) Rows::lse2(lse2, rows, t);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        weights[t][e] = ptx::exp2(fmaf(weights[t][e], p.scale_log2, -lse2[t % 2][e % 2]));
    }
  }
  __device__ __forceinline__ void start_dscores(int n) {
    const uint32_t rows = Rows::quad(block.rows(n));
#pragma unroll
    for (int t = 0; t < kQueryTiles; ++t) Rows::minus_delta(dscores[t], rows, t);
  }
  __device__ __forceinline__ void differentiate() {
#pragma unroll
    for (int t = 0; t < kQueryTiles; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) dscores[t][e] *= weights[t][e];
  }
  __device__ __forceinline__ void mask(int n) {
    int head, first_q;
    block.at(n, head, first_q);
#pragma unroll
    for (int t = 0; t < kQueryTiles; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = first_q + 8 * t + threadIdx.x % 4 * 2 + e % 2, j = key + e / 2 * 8;
        if (visible[e / 2] && block.band.contains(i, j)) continue;
        weights[t][e] = 0.0f;
        if (kDk) dscores[t][e] = 0.0f;
      }
  }

  // The products of the step before are still running when this begins. Its queries are there, and those of
  // the next will be.
  template <bool kMasked>
  __device__ __forceinline__ void step_over(int step) {
    if constexpr (kMasked) clear_tail(step);
    ptx::pin(weights);
    ptx::wgmma_fence();
    issue_rows<KTile, QTile>(weights, k, block.query_tile(step));
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    pin_results();
    if (step > 0) block.queries().release(step - 1);
    block.douts().wait(step);
    if constexpr (kDk) {
      start_dscores(step);
      ptx::pin(dscores);
      ptx::wgmma_fence();
      issue_rows<KTile, QTile>(dscores, v, block.dout_tile(step), true);
      ptx::wgmma_commit();
    }
    ptx::wgmma_wait<kDk ? 1 : 0>();
    ptx::pin(weights);
    weigh(step);
    // Keeps the compiler from moving the exponentials behind the end of the product (forward.h).
    wait_for_queries(step + 1);
    if constexpr (kDk) {
      ptx::wgmma_wait<0>();
      ptx::pin(dscores);
      if constexpr (Shape::kDoutsEarly) block.douts().release(step);
      differentiate();
    }
    if constexpr (kMasked) mask(step);
    if constexpr (kDv) pack<T>(left, weights);
    if constexpr (kDk) pack<T>(dleft, dscores);
    pin_results();
    ptx::wgmma_fence();
    if constexpr (kDv) issue_sum<QTile>(dv[0], left, block.dout_tile(step));
    if constexpr (kDk) issue_sum<QTile>(dk[0], dleft, block.query_tile(step));
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void wait_for_queries(int step) const {
    if (step < block.walk.count()) block.queries().wait(step);
  }
  __device__ __forceinline__ void pin_results() {
    if constexpr (kDv) ptx::pin(dv[0]);
    if constexpr (kDk) ptx::pin(dk[0]);
  }

  __device__ __forceinline__ void run() {
    if constexpr (kDk) clear(dk);
    if constexpr (kDv) clear(dv);
    const int count = block.walk.count(), masked = block.walk.masked();
    wait_for_queries(0);
    int step = 0;
#pragma unroll 1
    for (; step < masked; ++step) step_over<true>(step);
#pragma unroll 1
    for (; step < count; ++step) step_over<false>(step);
    ptx::wgmma_wait<0>();
    pin_results();
  }

  // A warp's rows of the k and v tiles are its own: they take its results on the way out.
  __device__ __forceinline__ void store() {
    const int warp_row = threadIdx.x / 32 * 16;
    const uint32_t k_tile = block.shared, v_tile = kDk ? k_tile + Shape::kValues : k_tile;
    if constexpr (kDk) store_accumulators<KTile>(k_tile, warp_row, dk[0], p.scale, p.scale);
    if constexpr (kDv) store_accumulators<KTile>(v_tile, warp_row, dv[0], 1.0f, 1.0f);
    __syncwarp();
    if constexpr (kDk)
      store_rows<KTile, 16>(k_tile, warp_row, key_matrix<T>(p.dk, block.s, block.kv_head, p.dim),
                            block.first_k);
    if constexpr (kDv)
      store_rows<KTile, 16>(v_tile, warp_row, key_matrix<T>(p.dv, block.s, block.kv_head, p.dim_v),
                            block.first_k);
  }
};

template <typename T, int kDim, bool kDk, bool kDv>
__global__ void __launch_bounds__(kThreads, 1) key_gradient(const __grid_constant__ MappedParams x) {
  using Shape = KeyGradientShape<T, kDim, kDk, kDv>;
  using KTile = typename Shape::KTile;
  extern __shared__ __align__(1024) uint8_t shared[];
  const Params& p = x.params;
  const uint32_t base = ptx::shared_address(shared);
  KeyBlock<Shape> block(p, Place(ceil_div(p.len_k, Shape::kBlockK), p.kv_heads), base);
  if (block.first_k >= block.s.len_k) return;
  if (threadIdx.x == kConsumers) {
    ptx::mbarrier_init(block.own_barrier(), 1);
    block.queries().init(kConsumerWarps, 1 + 32);
    block.douts().init(kConsumerWarps);
    ptx::fence_barrier_init();
  }
  const int key = block.first_k + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  bool visible[2] = {true, true};
  if (threadIdx.x < kConsumers) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = key + 8 * half;
      visible[half] = j < block.s.len_k &&
                      (p.key_mask == nullptr || p.key_mask[block.s.batch * p.key_mask_stride_b + j] != 0);
    }
  }
  block.set_walk(ptx::uniform(__syncthreads_and(visible[0] && visible[1])));

  if (threadIdx.x >= kConsumers) {
    ptx::release_registers<24>();
    if (threadIdx.x >= kConsumers + 32) return;
    if (threadIdx.x == kConsumers) {
      const int64_t row = block.s.first_k + block.first_k;
      ptx::mbarrier_arrive_expect(block.own_barrier(), Shape::kOwnBytes);
      load_panels<KTile>(base, x.k, block.own_barrier(), row, block.kv_head, block.s.batch);
      if constexpr (Shape::kValuesNeeded)
        load_panels<KTile>(base + Shape::kValues, x.v, block.own_barrier(), row, block.kv_head,
                           block.s.batch);
    }
    __syncwarp();
    produce(x, block);
    return;
  }

  ptx::acquire_registers<240>();
  KeyGradientConsumer<T, kDim, kDk, kDv> consumer(block, __shfl_sync(0xffffffffu, threadIdx.x / 128, 0), key,
                                                  visible);
  ptx::mbarrier_wait(block.own_barrier(), 0);
  consumer.run();
  ptx::named_barrier_sync(kAllConsumers, kConsumers);  // nobody reads k and v any more
  consumer.store();
}

template <typename T, int kDim, bool kDk, bool kDv>
Kernel key_gradient_kernel() {
  using Shape = KeyGradientShape<T, kDim, kDk, kDv>;
  return {key_gradient<T, kDim, kDk, kDv>, kThreads, Shape::kSharedBytes, Shape::kBlockQ, Shape::kBlockK};
}

}  // namespace fastattn::sm90
