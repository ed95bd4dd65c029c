// The dropout mask (docs/architecture.md has the stream) as the lanes of a warp hold scores.
#pragma once

#include "../../common/philox.h"
#include "sequence.h"

namespace fastattn {

struct DropoutStream {
  uint64_t seed;
  uint32_t threshold, head, batch;
  __device__ __forceinline__ DropoutStream(const Params& p, int head_index, int batch_index)
      : seed(p.dropout_seed_device != nullptr ? *p.dropout_seed_device : p.dropout_seed),
        threshold(p.dropout_threshold),
        head(head_index),
        batch(batch_index) {}
  // The 8 x 16 random bits of query i and the keys j, j + 16, ... of j's block of 128: lane = j % 16.
  __device__ __forceinline__ void draw(uint32_t (&r)[4], int i, int block, int lane) const {
    r[0] = i, r[1] = block * kDropoutLanes + lane, r[2] = head, r[3] = batch;
    philox(seed, r);
  }
};

// Calls visit(tile, element, keep) for every element of a warp's 16 x (8 kTiles) scores, whose first row is
// query `row` (as lane 0 sees it: pass row + lane / 4) and whose first key is a multiple of 8 kTiles.
template <int kTiles, typename Visit>
__device__ __forceinline__ void visit_dropout(const DropoutStream& stream, int row, int first_key,
                                              Visit visit) {
  constexpr int kKeys = 8 * kTiles;
  static_assert(kDropoutBlock % kKeys == 0 && kTiles % 2 == 0);
  const int first_slot = first_key / kDropoutLanes % kDropoutSlots;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) {
      const int odd = lane / 2, e = lane % 2;  // key = 16 * slot + 8 * odd + 2 * (thread % 4) + e
      uint32_t r[4];
      stream.draw(r, row + 8 * half, first_key / kDropoutBlock, 8 * odd + threadIdx.x % 4 * 2 + e);
      // Bring the first slot of this tile to the front.
      if (kKeys < 128 && (first_slot & 4)) r[0] = r[2], r[1] = r[3];
      if (kKeys < 64 && (first_slot & 2)) r[0] = r[1];
      if (kKeys < 32 && (first_slot & 1)) r[0] >>= 16;
#pragma unroll
      for (int slot = 0; slot < kTiles / 2; ++slot) {
        const uint32_t bits = slot % 2 == 0 ? r[slot / 2] & 0xffffu : r[slot / 2] >> 16;
        visit(2 * slot + odd, 2 * half + e, bits >= stream.threshold);
      }
    }
  }
}

// Backward by key tiles holds scores transposed, where one draw would serve a single element. So the block
// draws for kQueries queries and the 128 keys around its own at once: a byte for each query and lane, a bit
// for each slot.
template <int kQueries>
struct KeepBytes {
  static constexpr int kStride = kQueries + 8;  // spreads the 16 rows over the banks
  static constexpr int kBytes = kDropoutLanes * kStride;

  template <int kThreads>
  __device__ __forceinline__ static void fill(uint8_t* bytes, const DropoutStream& stream, int first_query,
                                              int first_key) {
#pragma unroll
    for (int item = threadIdx.x; item < kDropoutLanes * kQueries; item += kThreads) {
      const int query = item % kQueries, lane = item / kQueries;
      uint32_t r[4], keep = 0;
      stream.draw(r, first_query + query, first_key / kDropoutBlock, lane);
#pragma unroll
      for (int slot = 0; slot < kDropoutSlots; ++slot) {
        const uint32_t bits = slot % 2 == 0 ? r[slot / 2] & 0xffffu : r[slot / 2] >> 16;
        keep |= uint32_t(bits >= stream.threshold) << slot;
      }
      bytes[lane * kStride + query] = uint8_t(keep);
    }
  }
  template <int kThreads>
  __device__ __forceinline__ static void keep_all(uint8_t* bytes) {
    for (int at = threadIdx.x; at < kBytes; at += kThreads) bytes[at] = 0xff;
  }
  // Bits slot and 8 + slot: whether key 16 * slot + lane is kept by queries `query` (even) and query + 1.
  __device__ __forceinline__ static uint32_t pair(const uint8_t* bytes, int query, int lane) {
    return *reinterpret_cast<const uint16_t*>(bytes + lane * kStride + query);
  }
};

}  // namespace fastattn
