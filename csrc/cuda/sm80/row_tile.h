// The statistics of a tile's queries in shared memory, laid out for kernels whose scores are keys x queries:
// lane t of a quad holds columns 2t and 2t + 1 of every accumulator tile, in two rows each. What its
// accumulators start from is one load a tile, and the log-sum-exps of two tiles are another.
#pragma once

#include "../params.h"
#include "ptx.h"

namespace fastattn {

template <int kQueries>
struct RowTile {
  static_assert(kQueries % 16 == 0);
  static constexpr int kLseOffset = kQueries * 8;
  // Words are copied one a thread, by whole warps: behind the tile lie some that nobody reads.
  static constexpr int kCopies = (3 * kQueries + 31) / 32 * 32, kBytes = kCopies * 4;

  // Of which query word `index` of the tile is, and which of its RowStatistics.
  __device__ __forceinline__ static int query(int index) {
    const int i = index % kQueries;
    return index < 2 * kQueries ? index / 4 * 2 + index % 2
                                : i / 16 * 16 + i % 4 / 2 * 8 + i % 16 / 4 * 2 + i % 2;
  }
  __device__ __forceinline__ static int word(int index) { return index < 2 * kQueries ? 1 : 0; }

  // Queries 2 `pair` and the next, from a thread that has both.
  __device__ __forceinline__ static void store(uint32_t rows, int pair, const RowStatistics& first,
                                               const RowStatistics& second) {
    const uint32_t deltas[2] = {__float_as_uint(first.minus_delta), __float_as_uint(second.minus_delta)};
    ptx::store_shared_128(rows + pair * 16, {deltas[0], deltas[1], deltas[0], deltas[1]});
    ptx::store_shared_64(rows + kLseOffset + pair / 8 * 64 + pair % 4 * 16 + pair % 8 / 4 * 8,
                         __float_as_uint(first.lse2), __float_as_uint(second.lse2));
  }

  // `quad` comes from here: the tile as the calling lane sees it.
  __device__ __forceinline__ static uint32_t quad(uint32_t rows) { return rows + threadIdx.x % 4 * 16; }
  // The accumulators of tile n of dout v^T start from these.
  __device__ __forceinline__ static void minus_delta(float (&acc)[4], uint32_t quad, int n) {
    const uint4 x = ptx::load_shared_128(quad + n * 64);
    acc[0] = __uint_as_float(x.x), acc[1] = __uint_as_float(x.y);
    acc[2] = __uint_as_float(x.z), acc[3] = __uint_as_float(x.w);
  }
  // The base-2 log-sum-exps of the lane's columns of tiles n and n + 1, n even.
  __device__ __forceinline__ static void lse2(float (&columns)[2][2], uint32_t quad, int n) {
    const uint4 x = ptx::load_shared_128(quad + kLseOffset + n / 2 * 64);
    columns[0][0] = __uint_as_float(x.x), columns[0][1] = __uint_as_float(x.y);
    columns[1][0] = __uint_as_float(x.z), columns[1][1] = __uint_as_float(x.w);
  }
};

}  // namespace fastattn
