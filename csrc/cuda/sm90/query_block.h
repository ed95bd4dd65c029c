// What kernels have in common whose blocks own 128 queries of one head: two consumer warpgroups, 64 queries
// each, that step through the keys, and one thread of a third warpgroup that loads these by TMA.
#pragma once

#include "../sm80/careful.h"
#include "params.h"
#include "ring.h"
#include "tile.h"

namespace fastattn::sm90 {

constexpr int kConsumerWarps = 8, kConsumers = kConsumerWarps * 32, kThreads = kConsumers + 128;
constexpr uint32_t kAllConsumers = 1;  // a named barrier; 0 is __syncthreads

// Where a block is at work, known to producer and consumers alike.
template <typename Shape>
struct QueryBlock {
  int head, first_q;
  Sequence s;
  Band band;
  TileWalk walk;
  uint32_t shared;

  __device__ __forceinline__ QueryBlock(const Params& p, const Place& place, int q_tiles, uint32_t base)
      : head(place.head),
        // Blocks with the most keys under a causal mask come first in the grid.
        first_q((q_tiles - 1 - place.tile) * Shape::kBlockQ),
        s(p, place.batch),
        band(p, s),
        walk(walk_keys<Shape::kBlockK>(p, s, band, first_q, Shape::kBlockQ)),
        shared(base) {}

  // Computed anew wherever it is asked for: kept from one end of the kernel to the other, it would cost the
  // loops registers.
  __device__ __forceinline__ static QueryBlock here(const Params& p, uint32_t base) {
    int q_tiles = ceil_div(p.len_q, Shape::kBlockQ);
    ptx::pin(q_tiles);
    return QueryBlock(p, Place(q_tiles, p.heads), q_tiles, base);
  }

  // Barriers: of the tiles that stay, then of the rings.
  __device__ __forceinline__ uint32_t own_barrier() const { return shared + Shape::kBarriers; }
  __device__ __forceinline__ typename Shape::KeyRing keys() const { return {own_barrier() + 8}; }
  __device__ __forceinline__ typename Shape::ValueRing values() const {
    return {own_barrier() + 8 + Shape::KeyRing::kBytes};
  }
  __device__ __forceinline__ void init_barriers() const {
    ptx::mbarrier_init(own_barrier(), 1);
    keys().init(kConsumerWarps);
    values().init(kConsumerWarps);
    ptx::fence_barrier_init();
  }
  __device__ __forceinline__ uint32_t key_tile(int n) const {
    return shared + Shape::kKeys + Shape::KeyRing::stage(n) * Shape::KTile::kBytes;
  }
  __device__ __forceinline__ uint32_t value_tile(int n) const {
    return shared + Shape::kValues + Shape::ValueRing::stage(n) * Shape::KTile::kBytes;
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

// One thread: tiles `from` on of the rings, in the order of the walk; of a step that first whose stage the
// consumers give back first.
template <typename Shape>
__device__ __forceinline__ void produce(const MappedParams& x, const QueryBlock<Shape>& block, int from) {
  using KTile = typename Shape::KTile;
  const int head = block.head / x.params.group, batch = block.s.batch;
#pragma unroll 1
  for (int step = 0; step < block.walk.count(); ++step) {
    const int64_t row = block.s.first_k + block.walk.at(step) * Shape::kBlockK;
    const int n = from + step;
    const auto load_keys = [&] {
      block.keys().wait_free(n);
      load_panels<KTile>(block.key_tile(n), x.k, block.keys().announce(n, KTile::kBytes), row, head, batch);
    };
    if constexpr (!Shape::kValuesFirst) load_keys();
    block.values().wait_free(n);
    load_panels<KTile>(block.value_tile(n), x.v, block.values().announce(n, KTile::kBytes), row, head, batch);
    if constexpr (Shape::kValuesFirst) load_keys();
  }
}

// A kernel's body. A `Consumer` computes with the tiles: its constructor takes Params, the block and which of
// the warpgroups it is; load_own() brings the tiles that stay; run() steps through the keys; finite() says
// whether the result is; run_carefully() is the pass for when it is not; store() writes the result.
template <typename Consumer>
__device__ __forceinline__ void run_block(const MappedParams& x) {
  using Shape = typename Consumer::Shape;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = ptx::shared_address(shared);
  QueryBlock<Shape> block = QueryBlock<Shape>::here(x.params, base);
  if (block.first_q >= block.s.len_q) return;
  if (threadIdx.x == kConsumers) block.init_barriers();
  __syncthreads();
  const int count = block.walk.count();

  if (threadIdx.x >= kConsumers) {
    ptx::release_registers<24>();
    const bool loads = threadIdx.x == kConsumers;
    if (loads) {
      Consumer::load_own(x, block);
      produce(x, block, 0);
    }
    __syncwarp();
    if (__syncthreads_or(false)) {
      block.walk.mask_all();
      if (loads) produce(x, block, count);
    }
    return;
  }

  ptx::acquire_registers<240>();
  Consumer consumer(x.params, block, __shfl_sync(0xffffffffu, threadIdx.x / 128, 0));
  ptx::mbarrier_wait(block.own_barrier(), 0);
  consumer.run();
  const bool spoilt = __syncthreads_or(!consumer.finite());
  consumer.block = QueryBlock<Shape>::here(x.params, base);
  if (spoilt) {
    consumer.block.walk.mask_all();
    consumer.run_carefully(count, reinterpret_cast<uint32_t*>(shared + Shape::kNotes));
  }
  consumer.store();
}

// Accumulators of scores of queries `row` and row + 8 and of keys first_k on: `value` where a query does not
// see a key.
template <int kTiles>
__device__ __forceinline__ void mask_tile(float (&acc)[kTiles][4], const Params& p, const Sequence& s,
                                          const Band& band, int row, int first_k, float value) {
  const KeyBits<8 * kTiles> keys(p, s, first_k);
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = 8 * n + threadIdx.x % 4 * 2 + e % 2;
      if (!keys.test(key) || !band.contains(row + e / 2 * 8, first_k + key)) acc[n][e] = value;
    }
}

// Accumulators -> left operands of the product that follows.
template <typename T, int kTiles>
__device__ __forceinline__ void pack(Operand (&operands)[kTiles / 2], const float (&acc)[kTiles][4]) {
#pragma unroll
  for (int step = 0; step < kTiles / 2; ++step) to_operand<T>(operands[step], acc, step);
}

}  // namespace fastattn::sm90
