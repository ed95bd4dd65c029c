// Attention forward on Hopper: a block owns 128 queries of one head and steps through the keys they see.
//
// Two consumer warpgroups own 64 queries each; one thread of a third loads tiles by TMA into rings of stages.
// A consumer issues the scores of the next tile before the product of the present weights and values, so that
// the tensor cores work through both while it computes exponentials, and the two take turns at issuing, so
// that one computes exponentials while the other's products run (Shah et al. 2024, FlashAttention-3).
#pragma once

#include "../sm80/careful.h"
#include "../sm80/softmax.h"
#include "params.h"
#include "ring.h"
#include "tile.h"

namespace fastattn::sm90 {

constexpr int kConsumerWarps = 8, kConsumers = kConsumerWarps * 32, kThreads = kConsumers + 128;

// Named barriers; 0 is __syncthreads.
enum Barrier : uint32_t { kTurnOfFirst = 1, kTurnOfSecond, kAllConsumers };

template <typename T, int kDim>
struct ForwardShape {
  static constexpr int kBlockQ = 128, kBlockK = kDim <= 128 ? 128 : 64, kStages = 2;
  using QTile = Tile<T, kBlockQ, kDim>;
  using KTile = Tile<T, kBlockK, kDim>;
  using Clean = Cleaner<KTile>;
  // Offsets in shared memory.
  static constexpr int kKeys = QTile::kBytes, kValues = kKeys + kStages * KTile::kBytes,
                       kNotes = kValues + kStages * KTile::kBytes, kBarriers = kNotes + Clean::kBytes,
                       kSharedBytes = kBarriers + 8 + 2 * Ring<kStages>::kBytes;
  static_assert(kSharedBytes <= 227 * 1024);
};

// Where a block works, known to producer and consumers alike.
template <typename Shape>
struct Work {
  int head, first_q;
  Sequence s;
  Band band;
  TileWalk walk;
  uint32_t shared;

  __device__ __forceinline__ Work(const Params& p, const Place& place, int q_tiles, uint32_t base)
      : head(place.head),
        // Blocks with the most keys under a causal mask come first in the grid.
        first_q((q_tiles - 1 - place.tile) * Shape::kBlockQ),
        s(p, place.batch),
        band(p, s),
        walk(walk_keys<Shape::kBlockK>(p, s, band, first_q, Shape::kBlockQ)),
        shared(base) {}

  // Computed anew wherever it is asked for: kept from one end of the kernel to the other, it would cost the
  // loops registers.
  __device__ __forceinline__ static Work here(const Params& p, uint32_t base) {
    int q_tiles = ceil_div(p.len_q, Shape::kBlockQ);
    ptx::pin(q_tiles);
    return Work(p, Place(q_tiles, p.heads), q_tiles, base);
  }

  __device__ __forceinline__ uint32_t q_barrier() const { return shared + Shape::kBarriers; }
  __device__ __forceinline__ Ring<Shape::kStages> keys() const { return {q_barrier() + 8}; }
  __device__ __forceinline__ Ring<Shape::kStages> values() const {
    return {q_barrier() + 8 + Ring<Shape::kStages>::kBytes};
  }
  __device__ __forceinline__ uint32_t key_tile(int n) const {
    return shared + Shape::kKeys + n % Shape::kStages * Shape::KTile::kBytes;
  }
  __device__ __forceinline__ uint32_t value_tile(int n) const {
    return shared + Shape::kValues + n % Shape::kStages * Shape::KTile::kBytes;
  }
};

// One thread: a tile's panels, rows `row` on.
template <typename Tile>
__device__ __forceinline__ void load_panels(uint32_t tile, const TensorMap& x, uint32_t barrier, int64_t row,
                                            int head, int batch) {
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel)
    ptx::tensor_load_4d(tile + panel * Tile::kPanelBytes, &x.map, barrier, panel * Tile::kPanelCols, int(row),
                        head * x.head_step, batch * x.batch_step);
}

// One thread: tiles `from` on of the rings, in the order of the walk.
template <typename Shape>
__device__ __forceinline__ void produce(const ForwardParams& x, const Work<Shape>& work, int from) {
  using KTile = typename Shape::KTile;
  const int head = work.head / x.params.group, batch = work.s.batch;
#pragma unroll 1
  for (int step = 0; step < work.walk.count(); ++step) {
    const int64_t row = work.s.first_k + work.walk.at(step) * Shape::kBlockK;
    const int n = from + step;
    load_panels<KTile>(work.key_tile(n), x.k, work.keys().begin_fill(n, KTile::kBytes), row, head, batch);
    load_panels<KTile>(work.value_tile(n), x.v, work.values().begin_fill(n, KTile::kBytes), row, head, batch);
  }
}

// A consumer warpgroup's accumulators and what it does with a tile.
template <typename T, int kDim>
struct Consumer {
  using Shape = ForwardShape<T, kDim>;
  using QTile = typename Shape::QTile;
  using KTile = typename Shape::KTile;
  static constexpr int kKeyTiles = Shape::kBlockK / 8, kValueTiles = kDim / 8;

  const Params& p;
  Work<Shape> work;
  const uint32_t group;  // 0 or 1
  const uint64_t q;      // descriptor of its 64 rows
  const int row;         // this lane's first query
  float scores[1][kKeyTiles][4], out[1][kValueTiles][4];
  Operand weights[kKeyTiles / 2];
  OnlineSoftmax<1> softmax;

  __device__ __forceinline__ Consumer(const Params& params, const Work<Shape>& w)
      : p(params),
        work(w),
        group(__shfl_sync(0xffffffffu, threadIdx.x / 128, 0)),
        q(QTile::rows_descriptor(w.shared + group * 64 * 128)),
        row(w.first_q + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4) {}

  __device__ __forceinline__ void start() {
    clear(out);
    softmax.init();
  }

  __device__ __forceinline__ void issue_scores(int n) {
    ptx::pin(scores[0]);
    ptx::wgmma_fence();
    issue_rows<QTile, KTile>(scores[0], q, work.key_tile(n));
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void issue_out(int n) {
    ptx::pin(out[0]);
    ptx::wgmma_fence();
    issue_sum<KTile>(out[0], weights, work.value_tile(n));
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void mask(int step) {
    const int first_k = work.walk.at(step) * Shape::kBlockK;
    const KeyBits<Shape::kBlockK> keys(p, work.s, first_k);
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = row + e / 2 * 8, key = 8 * n + threadIdx.x % 4 * 2 + e % 2;
        if (!keys.test(key) || !work.band.contains(i, first_k + key)) scores[0][n][e] = -INFINITY;
      }
  }

  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int step = 0; step < kKeyTiles / 2; ++step) to_operand<T>(weights[step], scores[0], step);
  }

  // The group's turn to issue products: both take the same number of turns, the first begins.
  __device__ __forceinline__ void begin_turns() const {
    if (group == 1) ptx::named_barrier_arrive(kTurnOfFirst, kConsumers);
  }
  __device__ __forceinline__ void take_turn() const {
    ptx::named_barrier_sync(kTurnOfFirst + group, kConsumers);
  }
  __device__ __forceinline__ void pass_turn() const {
    ptx::named_barrier_arrive(kTurnOfSecond - group, kConsumers);
  }
  __device__ __forceinline__ void end_turns() const {
    if (group == 0) ptx::named_barrier_sync(kTurnOfFirst, kConsumers);
  }

  __device__ __forceinline__ void wait_for_keys(int step) const {
    if (step < work.walk.count()) work.keys().wait(step);
  }

  // The weights of step 0.
  __device__ __forceinline__ void first_step() {
    work.keys().wait(0);
    issue_scores(0);
    ptx::wgmma_wait<0>();
    ptx::pin(scores[0]);
    work.keys().release(0);
    if (work.walk.masked() > 0) mask(0);
    float highest[1][2], factor[1][2];
    if (softmax.find_highest(scores, p.scale_log2, highest)) softmax.move_base(highest, p.scale_log2, factor);
    softmax.weigh(scores, p.scale_log2);
    pack_weights();
    wait_for_keys(1);
  }

  // The weights of `step`, while the values of the step before are multiplied by theirs. The keys of the step
  // are there, and those of the next will be. Waiting for these stands between the exponentials and the end
  // of the products also because the compiler moves exponentials over the latter, but not over a loop.
  template <bool kMasked>
  __device__ __forceinline__ void step_over(int step) {
    take_turn();
    issue_scores(step);
    work.values().wait(step - 1);
    issue_out(step - 1);
    pass_turn();
    ptx::wgmma_wait<1>();
    ptx::pin(scores[0]);
    work.keys().release(step);
    if constexpr (kMasked) mask(step);
    float highest[1][2], factor[1][2] = {{1.0f, 1.0f}};
    const bool moves = softmax.find_highest(scores, p.scale_log2, highest);
    if (moves) softmax.move_base(highest, p.scale_log2, factor);
    softmax.weigh(scores, p.scale_log2);
    wait_for_keys(step + 1);
    ptx::wgmma_wait<0>();
    ptx::pin(out[0]);
    work.values().release(step - 1);
    if (moves) softmax.rescale(out, factor);
    pack_weights();
  }

  __device__ __forceinline__ void last_product() {
    const int last = work.walk.count() - 1;
    work.values().wait(last);
    issue_out(last);
    ptx::wgmma_wait<0>();
    ptx::pin(out[0]);
    work.values().release(last);
  }

  __device__ __forceinline__ void run() {
    start();
    const int count = work.walk.count(), masked = work.walk.masked();
    if (count == 0) return;
    begin_turns();
    first_step();
    int step = 1;
#pragma unroll 1
    for (; step < masked; ++step) step_over<true>(step);
#pragma unroll 1
    for (; step < count; ++step) step_over<false>(step);
    end_turns();
    last_product();
  }

  // The pass for blocks that met NaN or infinity (sm80/careful.h): one step after the other, all masked.
  // Tiles `from` on of the rings.
  __device__ __forceinline__ void run_carefully(int from, uint32_t* notes) {
    start();
#pragma unroll 1
    for (int step = 0; step < work.walk.count(); ++step) {
      const int n = from + step, first_k = work.walk.at(step) * Shape::kBlockK;
      work.keys().wait(n);
      issue_scores(n);
      ptx::wgmma_wait<0>();
      ptx::pin(scores[0]);
      work.keys().release(n);
      mask(step);
      softmax.update(scores, out, p.scale_log2);
      pack_weights();
      work.values().wait(n);
      Shape::Clean::template clean<kConsumers>(work.value_tile(n), notes);
      ptx::fence_proxy_async();
      ptx::named_barrier_sync(kAllConsumers, kConsumers);
      issue_out(n);
      ptx::wgmma_wait<0>();
      ptx::pin(out[0]);
      work.values().release(n);
      Shape::Clean::spoil(out, notes, KeyBits<Shape::kBlockK>(p, work.s, first_k), work.band, row, first_k);
      ptx::named_barrier_sync(kAllConsumers, kConsumers);
    }
  }

  // A warp's rows of the q tile are its own: they take its results on the way out.
  __device__ __forceinline__ void store() {
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16, head = work.head;
    float inverse[2], lse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      softmax.finish(0, half, inverse[half], lse[half]);
      const int i = row + 8 * half;
      if (p.lse.data != nullptr && lane % 4 == 0 && i < work.s.len_q)
        row_pointer(p.lse, work.s, head)[i] = lse[half];
    }
    store_accumulators<QTile>(work.shared, warp_row, out[0], inverse[0], inverse[1]);
    __syncwarp();
    store_rows<QTile, 16>(work.shared, warp_row, query_matrix<T>(p.out, work.s, head, p.dim_v), work.first_q);
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1) forward(const __grid_constant__ ForwardParams x) {
  using Shape = ForwardShape<T, kDim>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = ptx::shared_address(shared);
  Work<Shape> work = Work<Shape>::here(x.params, base);
  if (work.first_q >= work.s.len_q) return;
  if (threadIdx.x == kConsumers) {
    ptx::mbarrier_init(work.q_barrier(), 1);
    work.keys().init(kConsumerWarps);
    work.values().init(kConsumerWarps);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  const int count = work.walk.count();

  if (threadIdx.x >= kConsumers) {
    ptx::release_registers<24>();
    const bool loads = threadIdx.x == kConsumers;
    if (loads) {
      ptx::mbarrier_arrive_expect(work.q_barrier(), Shape::QTile::kBytes);
      load_panels<typename Shape::QTile>(work.shared, x.q, work.q_barrier(), work.s.first_q + work.first_q,
                                         work.head, work.s.batch);
      produce(x, work, 0);
    }
    __syncwarp();
    if (__syncthreads_or(false)) {
      work.walk.mask_all();
      if (loads) produce(x, work, count);
    }
    return;
  }

  ptx::acquire_registers<240>();
  Consumer<T, kDim> consumer(x.params, work);
  ptx::mbarrier_wait(work.q_barrier(), 0);
  consumer.run();
  const bool spoilt = __syncthreads_or(!all_finite(consumer.out));
  consumer.work = Work<Shape>::here(x.params, base);
  if (spoilt) {
    consumer.work.walk.mask_all();
    consumer.run_carefully(count, reinterpret_cast<uint32_t*>(shared + Shape::kNotes));
  }
  consumer.store();
}

template <typename T, int kDim>
ForwardKernel forward_kernel(int dtype) {
  using Shape = ForwardShape<T, kDim>;
  return {dtype, kDim, forward<T, kDim>, kThreads, Shape::kSharedBytes, Shape::kBlockQ, Shape::kBlockK};
}

}  // namespace fastattn::sm90
