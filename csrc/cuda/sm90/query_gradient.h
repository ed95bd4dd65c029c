// Gradient of queries on Hopper: a block owns 128 queries of one head and steps through the keys they see, as
// forward does. The product of score gradients and keys runs while the next tile's scores are issued, and the
// weights are computed while that tile's dout v^T runs.
//
// A tile of values is free once that product is done, a tile of keys only after the next step's scores: at
// head dimension 256, where shared memory ends at three tiles of each step's, values have one stage.
#pragma once

#include "query_block.h"

namespace fastattn::sm90 {

template <typename T, int kDim>
struct QueryGradientShape {
  static constexpr int kBlockQ = 128, kBlockK = kDim <= 64 ? 128 : 64;
  using KeyRing = Ring<2>;
  using ValueRing = Ring<kDim <= 128 ? 2 : 1>;
  // Values are given back before the keys of the step. With one stage they can't come first: for them to be
  // given back, the next keys must be there.
  static constexpr bool kValuesFirst = ValueRing::kStages > 1;
  using QTile = Tile<T, kBlockQ, kDim>;
  using KTile = Tile<T, kBlockK, kDim>;
  using Clean = Cleaner<KTile>;
  // Offsets in shared memory.
  static constexpr int kDout = QTile::kBytes, kKeys = 2 * QTile::kBytes,
                       kValues = kKeys + KeyRing::kStages * KTile::kBytes,
                       kNotes = kValues + ValueRing::kStages * KTile::kBytes,
                       kBarriers = kNotes + Clean::kBytes,
                       kSharedBytes = kBarriers + 8 + KeyRing::kBytes + ValueRing::kBytes;
  static_assert(kSharedBytes <= 227 * 1024);
};

template <typename T, int kDim>
struct QueryGradientConsumer {
  using Shape = QueryGradientShape<T, kDim>;
  using QTile = typename Shape::QTile;
  using KTile = typename Shape::KTile;
  static constexpr int kKeyTiles = Shape::kBlockK / 8, kOutTiles = kDim / 8;

  const Params& p;
  QueryBlock<Shape> block;
  const uint64_t q, dout;  // descriptors of its 64 rows
  const int row;           // this lane's first query
  float lse2[2], minus_delta[2];
  float scores[kKeyTiles][4], dscores[kKeyTiles][4], dq[1][kOutTiles][4];
  Operand factors[kKeyTiles / 2];

  __device__ __forceinline__ QueryGradientConsumer(const Params& params, const QueryBlock<Shape>& b,
                                                   uint32_t group)
      : p(params),
        block(b),
        q(QTile::rows_descriptor(b.shared + group * 64 * 128)),
        dout(QTile::rows_descriptor(b.shared + Shape::kDout + group * 64 * 128)),
        row(b.first_q + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = row + 8 * half;
      const RowStatistics r =
          i < block.s.len_q ? row_statistics(p, block.s, block.head)[i] : RowStatistics{INFINITY, 0.0f};
      lse2[half] = r.lse2, minus_delta[half] = r.minus_delta;
    }
  }

  // One thread of the producer's.
  __device__ __forceinline__ static void load_own(const MappedParams& x, const QueryBlock<Shape>& block) {
    const int64_t row = block.s.first_q + block.first_q;
    ptx::mbarrier_arrive_expect(block.own_barrier(), 2 * QTile::kBytes);
    load_panels<QTile>(block.shared, x.q, block.own_barrier(), row, block.head, block.s.batch);
    load_panels<QTile>(block.shared + Shape::kDout, x.dout, block.own_barrier(), row, block.head,
                       block.s.batch);
  }
  __device__ __forceinline__ bool finite() const { return all_finite(dq); }

  __device__ __forceinline__ void issue_scores(int n) {
    ptx::pin(scores);
    ptx::wgmma_fence();
    issue_rows<QTile, KTile>(scores, q, block.key_tile(n));
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void issue_dscores(int n) {
    block.values().wait(n);
    ptx::pin(dscores);
    ptx::wgmma_fence();
    issue_rows<QTile, KTile>(dscores, dout, block.value_tile(n));
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void issue_dq(int n) {
    ptx::pin(dq[0]);
    ptx::wgmma_fence();
    issue_sum<KTile>(dq[0], factors, block.key_tile(n));
    ptx::wgmma_commit();
  }

  __device__ __forceinline__ void weigh() {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) scores[n][e] = ptx::exp2(fmaf(scores[n][e], p.scale_log2, -lse2[e / 2]));
  }
  // dscores: from the gradient of the weights to that of the scores.
  __device__ __forceinline__ void differentiate() {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) dscores[n][e] = scores[n][e] * (dscores[n][e] + minus_delta[e / 2]);
  }
  __device__ __forceinline__ void mask(int step) {
    mask_tile(dscores, p, block.s, block.band, row, block.walk.at(step) * Shape::kBlockK, 0.0f);
  }

  // The product of the step before is still running when this begins. Its keys are there, and those of the
  // next will be.
  template <bool kMasked>
  __device__ __forceinline__ void step_over(int step) {
    issue_scores(step);
    issue_dscores(step);
    ptx::wgmma_wait<1>();
    ptx::pin(scores);
    ptx::pin(dq[0]);
    if (step > 0) block.keys().release(step - 1);
    weigh();
    // Keeps the compiler from moving the exponentials behind the end of the product (forward.h).
    wait_for_keys(step + 1);
    ptx::wgmma_wait<0>();
    ptx::pin(dscores);
    block.values().release(step);
    differentiate();
    if constexpr (kMasked) mask(step);
    pack<T>(factors, dscores);
    issue_dq(step);
  }

  __device__ __forceinline__ void wait_for_keys(int step) const {
    if (step < block.walk.count()) block.keys().wait(step);
  }

  __device__ __forceinline__ void run() {
    clear(dq);
    wait_for_keys(0);
    const int count = block.walk.count(), masked = block.walk.masked();
    int step = 0;
#pragma unroll 1
    for (; step < masked; ++step) step_over<true>(step);
#pragma unroll 1
    for (; step < count; ++step) step_over<false>(step);
    ptx::wgmma_wait<0>();
    ptx::pin(dq[0]);
    if (count > 0) block.keys().release(count - 1);
  }

  // The pass for blocks that met NaN or infinity (sm80/careful.h): one step after the other, all masked.
  // Tiles `from` on of the rings.
  __device__ __forceinline__ void run_carefully(int from, uint32_t* notes) {
    clear(dq);
#pragma unroll 1
    for (int step = 0; step < block.walk.count(); ++step) {
      const int n = from + step, first_k = block.walk.at(step) * Shape::kBlockK;
      block.keys().wait(n);
      issue_scores(n);
      issue_dscores(n);
      ptx::wgmma_wait<0>();
      ptx::pin(scores);
      ptx::pin(dscores);
      block.values().release(n);
      weigh();
      differentiate();
      mask(step);
      pack<T>(factors, dscores);
      ptx::named_barrier_sync(kAllConsumers, kConsumers);
      Shape::Clean::template clean<kConsumers>(block.key_tile(n), notes);
      ptx::fence_proxy_async();
      ptx::named_barrier_sync(kAllConsumers, kConsumers);
      issue_dq(n);
      ptx::wgmma_wait<0>();
      ptx::pin(dq[0]);
      block.keys().release(n);
      Shape::Clean::spoil(dq, notes, KeyBits<Shape::kBlockK>(p, block.s, first_k), block.band, row, first_k);
    }
  }

  // A warp's rows of the q tile are its own: they take its results on the way out.
  __device__ __forceinline__ void store() {
    const int warp_row = threadIdx.x / 32 * 16;
    store_accumulators<QTile>(block.shared, warp_row, dq[0], p.scale, p.scale);
    __syncwarp();
    store_rows<QTile, 16>(block.shared, warp_row, query_matrix<T>(p.dq, block.s, block.head, p.dim),
                          block.first_q);
  }
};

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1) query_gradient(const __grid_constant__ MappedParams x) {
  run_block<QueryGradientConsumer<T, kDim>>(x);
}

template <typename T, int kDim>
Kernel query_gradient_kernel() {
  using Shape = QueryGradientShape<T, kDim>;
  return {query_gradient<T, kDim>, kThreads, Shape::kSharedBytes, Shape::kBlockQ, Shape::kBlockK};
}

}  // namespace fastattn::sm90
