// Attention forward on Hopper: a block owns 128 queries of one head and steps through the keys they see.
//
// Two consumer warpgroups own 64 queries each; one thread of a third loads tiles by TMA into rings of stages.
// A consumer issues the scores of the next tile before the product of the present weights and values, so that
// the tensor cores block through both while it computes exponentials, and the two take turns at issuing, so
// that one computes exponentials while the other's products run (Shah et al. 2024, FlashAttention-3).
#pragma once

#include "../sm80/softmax.h"
#include "query_block.h"

namespace fastattn::sm90 {

constexpr uint32_t kTurnOfFirst = 2, kTurnOfSecond = 3;  // named barriers

template <typename T, int kDim>
struct ForwardShape {
  static constexpr int kBlockQ = 128, kBlockK = kDim <= 128 ? 128 : 64;
  using KeyRing = Ring<2>;
  using ValueRing = Ring<2>;
  static constexpr bool kValuesFirst = false;
  using QTile = Tile<T, kBlockQ, kDim>;
  using KTile = Tile<T, kBlockK, kDim>;
  using Clean = Cleaner<KTile>;
  // Offsets in shared memory.
  static constexpr int kKeys = QTile::kBytes, kValues = kKeys + KeyRing::kStages * KTile::kBytes,
                       kNotes = kValues + ValueRing::kStages * KTile::kBytes,
                       kBarriers = kNotes + Clean::kBytes,
                       kSharedBytes = kBarriers + 8 + KeyRing::kBytes + ValueRing::kBytes;
  static_assert(kSharedBytes <= 227 * 1024);
};

// A consumer warpgroup's accumulators and what it does with a tile.
template <typename T, int kDim>
struct Consumer {
  using Shape = ForwardShape<T, kDim>;
  using QTile = typename Shape::QTile;
  using KTile = typename Shape::KTile;
  static constexpr int kKeyTiles = Shape::kBlockK / 8, kValueTiles = kDim / 8;

  const Params& p;
  QueryBlock<Shape> block;
  const uint32_t group;  // 0 or 1
  const uint64_t q;      // descriptor of its 64 rows
  const int row;         // this lane's first query
  float scores[1][kKeyTiles][4], out[1][kValueTiles][4];
  Operand weights[kKeyTiles / 2];
  OnlineSoftmax<1> softmax;

  __device__ __forceinline__ Consumer(const Params& params, const QueryBlock<Shape>& b, uint32_t which)
      : p(params),
        block(b),
        group(which),
        q(QTile::rows_descriptor(b.shared + group * 64 * 128)),
        row(b.first_q + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4) {}

  // One thread of the producer's.
  __device__ __forceinline__ static void load_own(const MappedParams& x, const QueryBlock<Shape>& block) {
    ptx::mbarrier_arrive_expect(block.own_barrier(), QTile::kBytes);
    load_panels<QTile>(block.shared, x.q, block.own_barrier(), block.s.first_q + block.first_q, block.head,
                       block.s.batch);
  }
  __device__ __forceinline__ bool finite() const { return all_finite(out); }

  __device__ __forceinline__ void start() {
    clear(out);
    softmax.init();
  }

  __device__ __forceinline__ void issue_scores(int n) {
    ptx::pin(scores[0]);
    ptx::wgmma_fence();
    issue_rows<QTile, KTile>(scores[0], q, block.key_tile(n));
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void issue_out(int n) {
    ptx::pin(out[0]);
    ptx::wgmma_fence();
    issue_sum<KTile>(out[0], weights, block.value_tile(n));
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void mask(int step) {
    mask_tile(scores[0], p, block.s, block.band, row, block.walk.at(step) * Shape::kBlockK, -INFINITY);
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
    if (step < block.walk.count()) block.keys().wait(step);
  }

  // The weights of step 0.
  __device__ __forceinline__ void first_step() {
    block.keys().wait(0);
    issue_scores(0);
    ptx::wgmma_wait<0>();
    ptx::pin(scores[0]);
    block.keys().release(0);
    if (block.walk.masked() > 0) mask(0);
    float highest[1][2], factor[1][2];
    if (softmax.find_highest(scores, p.scale_log2, highest)) softmax.move_base(highest, p.scale_log2, factor);
    softmax.weigh(scores, p.scale_log2);
    pack<T>(weights, scores[0]);
    wait_for_keys(1);
  }

  // The weights of `step`, while the values of the step before are multiplied by theirs. The keys of the step
  // are there, and those of the next will be. Waiting for these stands between the exponentials and the end
  // of the products also because the compiler moves exponentials over the latter, but not over a loop.
  template <bool kMasked>
  __device__ __forceinline__ void step_over(int step) {
    take_turn();
    issue_scores(step);
    block.values().wait(step - 1);
    issue_out(step - 1);
    pass_turn();
    ptx::wgmma_wait<1>();
    ptx::pin(scores[0]);
    block.keys().release(step);
    if constexpr (kMasked) mask(step);
    float highest[1][2], factor[1][2] = {{1.0f, 1.0f}};
    const bool moves = softmax.find_highest(scores, p.scale_log2, highest);
    if (moves) softmax.move_base(highest, p.scale_log2, factor);
    softmax.weigh(scores, p.scale_log2);
    wait_for_keys(step + 1);
    ptx::wgmma_wait<0>();
    ptx::pin(out[0]);
    block.values().release(step - 1);
    if (moves) softmax.rescale(out, factor);
    pack<T>(weights, scores[0]);
  }

  __device__ __forceinline__ void last_product() {
    const int last = block.walk.count() - 1;
    block.values().wait(last);
    issue_out(last);
    ptx::wgmma_wait<0>();
    ptx::pin(out[0]);
    block.values().release(last);
  }

  __device__ __forceinline__ void run() {
    start();
    const int count = block.walk.count(), masked = block.walk.masked();
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
    for (int step = 0; step < block.walk.count(); ++step) {
      const int n = from + step, first_k = block.walk.at(step) * Shape::kBlockK;
      block.keys().wait(n);
      issue_scores(n);
      ptx::wgmma_wait<0>();
      ptx::pin(scores[0]);
      block.keys().release(n);
      mask(step);
      softmax.update(scores, out, p.scale_log2);
      pack<T>(weights, scores[0]);
      block.values().wait(n);
      Shape::Clean::template clean<kConsumers>(block.value_tile(n), notes);
      ptx::fence_proxy_async();
      ptx::named_barrier_sync(kAllConsumers, kConsumers);
      issue_out(n);
      ptx::wgmma_wait<0>();
      ptx::pin(out[0]);
      block.values().release(n);
      Shape::Clean::spoil(out, notes, KeyBits<Shape::kBlockK>(p, block.s, first_k), block.band, row, first_k);
      ptx::named_barrier_sync(kAllConsumers, kConsumers);
    }
  }

  // A warp's rows of the q tile are its own: they take its results on the way out.
  __device__ __forceinline__ void store() {
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16, head = block.head;
    float inverse[2], lse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      softmax.finish(0, half, inverse[half], lse[half]);
      const int i = row + 8 * half;
      if (p.lse.data != nullptr && lane % 4 == 0 && i < block.s.len_q)
        row_pointer(p.lse, block.s, head)[i] = lse[half];
    }
    store_accumulators<QTile>(block.shared, warp_row, out[0], inverse[0], inverse[1]);
    __syncwarp();
    store_rows<QTile, 16>(block.shared, warp_row, query_matrix<T>(p.out, block.s, head, p.dim_v),
                          block.first_q);
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1) forward(const __grid_constant__ MappedParams x) {
  run_block<Consumer<T, kDim>>(x);
}

template <typename T, int kDim>
Kernel forward_kernel() {
  using Shape = ForwardShape<T, kDim>;
  return {forward<T, kDim>, kThreads, Shape::kSharedBytes, Shape::kBlockQ, Shape::kBlockK};
}

}  // namespace fastattn::sm90
