// Global memory -> shared tile (asynchronous), and accumulators -> global memory by way of a shared tile.
#pragma once

#include "../params.h"
#include "tile.h"

namespace fastattn {

// A matrix in global memory as one (sequence, head) sees it.
template <typename T>
struct Matrix {
  T* data;     // row 0
  int stride;  // elements from row to row
  int rows;
  int cols;
  bool aligned;  // every row starts on a 16-byte boundary
};

// Rows of a matrix into a tile, with zeros beyond the matrix: one cp.async of 16 bytes a chunk. The matrix is
// aligned (plan.cpp has seen to that) and its columns are a whole number of chunks. A thread of kThreads
// remembers where its part of the tile begins, and moves on from there.
template <typename Tile, int kThreads, typename T>
class TileSource {
  static constexpr int kLanes = Tile::kPeriod;  // neighbouring threads that share a row
  static constexpr int kRowsPerPass = kThreads / kLanes;
  static_assert(kRowsPerPass % 8 == 0, "a thread keeps its permutation from pass to pass");

 public:
  // Rows row0 on.
  __device__ __forceinline__ void seek(const Matrix<T>& m, int row0) {
    at_ = m.data + int64_t(row0 + thread_row()) * m.stride + thread_chunk() * Tile::kElementsPerChunk;
  }
  __device__ __forceinline__ void next_tile(int stride) { at_ = ptx::advance<Tile::kRows>(at_, stride); }
  __device__ __forceinline__ void jump(int64_t elements) { at_ += elements; }

  // Without kBounded all rows are inside.
  template <bool kBounded>
  __device__ __forceinline__ void load(uint32_t tile, const Matrix<T>& m, int row0) const {
    const int r = thread_row(), c = thread_chunk();
    const uint32_t target = tile + Tile::offset(r, c);
    T* source = at_;
#pragma unroll
    for (int row = 0; row < Tile::kRows; row += kRowsPerPass) {
      if (Tile::kRows % kRowsPerPass != 0 && r + row >= Tile::kRows) break;
      const bool row_inside = !kBounded || row0 + r + row < m.rows;
#pragma unroll
      for (int chunk = 0; chunk < Tile::kChunks; chunk += kLanes) {
        const bool inside = row_inside && (c + chunk) * Tile::kElementsPerChunk < m.cols;
        ptx::cp_async_16(target + row * Tile::kRowBytes + chunk * 16,
                         source + chunk * Tile::kElementsPerChunk, inside);
      }
      source = ptx::advance<kRowsPerPass>(source, m.stride);
    }
  }

 private:
  __device__ __forceinline__ static int thread_row() { return threadIdx.x / kLanes; }
  __device__ __forceinline__ static int thread_chunk() { return threadIdx.x % kLanes; }
  T* at_;
};

template <typename Tile, int kThreads, typename T>
__device__ __forceinline__ void load_tile(uint32_t tile, const Matrix<T>& m, int row0) {
  TileSource<Tile, kThreads, T> source;
  source.seek(m, row0);
  source.template load<true>(tile, m, row0);
}

// The 16 x (8 kTiles) accumulators of one warp, times `scale` a row, rounded to T, to rows row .. row + 15 of
// a shared tile.
template <typename Tile, int kTiles>
__device__ __forceinline__ void store_accumulators(uint32_t tile, int row, const float (&acc)[kTiles][4],
                                                   float scale_upper, float scale_lower) {
  using T = typename Tile::T;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const float a = acc[n][0] * scale_upper, b = acc[n][1] * scale_upper;
    const float c = acc[n][2] * scale_lower, d = acc[n][3] * scale_lower;
    if constexpr (sizeof(T) == 2) {
      ptx::store_shared_32(tile + Tile::offset(row + g, n) + t * 4, Element<T>::pack(a, b));
      ptx::store_shared_32(tile + Tile::offset(row + g + 8, n) + t * 4, Element<T>::pack(c, d));
    } else {
      const int chunk = 2 * n + t / 2, byte = t % 2 * 8;
      ptx::store_shared_64(tile + Tile::offset(row + g, chunk) + byte, __float_as_uint(a),
                           __float_as_uint(b));
      ptx::store_shared_64(tile + Tile::offset(row + g + 8, chunk) + byte, __float_as_uint(c),
                           __float_as_uint(d));
    }
  }
}

// kRows rows of a shared tile, first `row` on, by one warp to rows row0 + row on of the matrix: 16 bytes at a
// time where it is aligned.
template <typename Tile, int kRows, typename T>
__device__ __forceinline__ void store_rows(uint32_t tile, int row, const Matrix<T>& m, int row0) {
  constexpr int kLanes = Tile::kPeriod;
  const int lane = threadIdx.x % 32, r = row + lane / kLanes, c = lane % kLanes;
#pragma unroll
  for (int pass = 0; pass < kRows; pass += 32 / kLanes) {
    const int i = r + pass;
    if (row0 + i >= m.rows) break;
    T* out = m.data + int64_t(row0 + i) * m.stride;
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; chunk += kLanes) {
      const int col = (c + chunk) * Tile::kElementsPerChunk;
      const uint4 value = ptx::load_shared_128(tile + Tile::offset(i, c + chunk));
      if (m.aligned && col + Tile::kElementsPerChunk <= m.cols) {
        ptx::store_global_128(out + col, value);
      } else {
        const uint32_t words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
        for (int e = 0; e < Tile::kElementsPerChunk; ++e) {
          if (col + e >= m.cols) break;
          if constexpr (sizeof(T) == 2) {
            out[col + e].bits = uint16_t(words[e / 2] >> (16 * (e % 2)));
          } else {
            out[col + e] = __uint_as_float(words[e]);
          }
        }
      }
    }
  }
}

}  // namespace fastattn
