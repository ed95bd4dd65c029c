// A matrix tile in shared memory as TMA writes it and wgmma reads it.
//
// Columns lie in panels of 64 (128 bytes), one after another; within a panel the rows do, and the 16-byte
// chunks of a row are permuted by XOR with the three low bits of the row number ("128-byte swizzle").
#pragma once

#include "ptx.h"

namespace fastattn::sm90 {

template <typename T_, int kRows_, int kCols_>
struct Tile {
  using T = T_;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kElementsPerChunk = 16 / int(sizeof(T));
  static constexpr int kChunks = kCols / kElementsPerChunk;
  static constexpr int kPeriod = 8;  // chunks that are permuted among themselves
  static constexpr int kPanelCols = kPeriod * kElementsPerChunk;
  static constexpr int kPanels = kCols / kPanelCols;
  static constexpr int kPanelBytes = kRows * 128;
  static constexpr int kBytes = kPanels * kPanelBytes;
  static_assert(kCols % kPanelCols == 0 && kRows % 8 == 0);

  __device__ __forceinline__ static uint32_t offset(int row, int chunk) {
    return chunk / kPeriod * kPanelBytes + row * 128 + ((chunk % kPeriod ^ (row & 7)) << 4);
  }

  // Matrix descriptors ("Asynchronous Warpgroup Level Matrix Shared Memory Layout" in the PTX ISA): address,
  // leading and stride offsets in units of 16 bytes, and the swizzle. Tiles are aligned to 1024 bytes.
  //
  // Operands whose rows run along the summed dimension: 8 rows are 1024 bytes. `rows_at` is the operand of
  // step k (16 columns), whose rows begin at `row`, a multiple of 8.
  __device__ __forceinline__ static uint64_t rows_descriptor(uint32_t tile) {
    return kSwizzle128 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 16 | encoded(tile);
  }
  __device__ __forceinline__ static constexpr uint64_t rows_step(int step) {
    return (step / 4 * kPanelBytes + step % 4 * 32) >> 4;
  }
  // Operands whose rows are summed over: panels are a leading offset apart, 8 rows a stride offset.
  __device__ __forceinline__ static uint64_t sum_descriptor(uint32_t tile) {
    return kSwizzle128 | uint64_t(1024 >> 4) << 32 | uint64_t(kPanelBytes >> 4) << 16 | encoded(tile);
  }
  __device__ __forceinline__ static constexpr uint64_t sum_step(int step) { return step * 16 * 128 >> 4; }

 private:
  static constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  __device__ __forceinline__ static uint64_t encoded(uint32_t tile) { return (tile & 0x3ffff) >> 4; }
};

// acc = left * tile^T over all columns, for the warpgroup's 64 rows of the left tile, or that added to acc.
// Issued, not waited for.
template <typename LeftTile, typename RightTile, int kTiles>
__device__ __forceinline__ void issue_rows(float (&acc)[kTiles][4], uint64_t left, uint32_t tile,
                                           bool add = false) {
  static_assert(kTiles * 8 == RightTile::kRows && LeftTile::kCols == RightTile::kCols);
  const uint64_t right = RightTile::rows_descriptor(tile);
#pragma unroll
  for (int step = 0; step < LeftTile::kCols / 16; ++step)
    ptx::Wgmma<typename RightTile::T, kTiles>::rows(acc, left + LeftTile::rows_step(step),
                                                    right + RightTile::rows_step(step), add || step > 0);
}

// acc += weights * tile. Issued, not waited for.
template <typename RightTile, int kTiles, int kSteps>
__device__ __forceinline__ void issue_sum(float (&acc)[kTiles][4], const Operand (&weights)[kSteps],
                                          uint32_t tile) {
  static_assert(kTiles * 8 == RightTile::kCols && kSteps * 16 == RightTile::kRows);
  const uint64_t right = RightTile::sum_descriptor(tile);
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    ptx::Wgmma<typename RightTile::T, kTiles>::sum(acc, weights[step], right + RightTile::sum_step(step));
}

}  // namespace fastattn::sm90
