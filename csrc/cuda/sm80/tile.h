// A matrix tile in shared memory and the operands it gives.
//
// Rows lie one after another, and the 16-byte chunks of a row are permuted by XOR with bits of the row
// number, so that the eight rows that one ldmatrix phase reads (and the rows an accumulator is written to)
// fall into eight different groups of four banks. Rows of a multiple of 128 bytes start in the same bank:
// three bits of the row number spread them. Rows of 64 or 192 bytes start in alternate halves: two bits, from
// the second lowest up, do.
#pragma once

#include "element.h"

namespace fastattn {

template <typename T_, int kRows_, int kCols_>
struct Tile {
  using T = T_;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kRowBytes = kCols * int(sizeof(T));
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kBytes = kRows * kRowBytes;
  static constexpr int kPeriod = kRowBytes % 128 == 0 ? 8 : 4;  // chunks that are permuted among themselves
  static constexpr int kElementsPerChunk = 16 / int(sizeof(T));
  // Where registers allow, what a lane adds to a tile's address is kept, and the address is uniform.
  static constexpr bool kLanesApart = sizeof(T) == 2;
  static_assert(kRowBytes % 64 == 0, "a row is a whole number of permuted groups");

  __device__ __forceinline__ static uint32_t permutation(int row) {
    return kPeriod == 8 ? row & 7 : (row >> 1) & 3;
  }
  __device__ __forceinline__ static uint32_t offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ permutation(row)) << 4);
  }
  // Where 32 bytes further along the row are, `steps` times. `address` is that of chunk 0 or 1 of a row in a
  // tile aligned to kPeriod chunks.
  __device__ __forceinline__ static uint32_t along_row(uint32_t address, int steps) {
    constexpr int kSteps = kPeriod / 2;
    return (address ^ ((steps % kSteps) << 5)) + (steps / kSteps) * (kPeriod * 16);
  }

  // Addresses a lane gives to ldmatrix. `left` serves left operands (16 rows of the result) and transposed
  // right operands (16 summed rows); `right` serves right operands (16 columns of the result).
  __device__ __forceinline__ static uint32_t left_address(uint32_t tile, int lane) {
    return tile + offset(lane & 15, lane >> 4);
  }
  __device__ __forceinline__ static uint32_t right_address(uint32_t tile, int lane) {
    return tile + offset((lane & 7) | ((lane >> 1) & 8), (lane >> 3) & 1);
  }

  // Two right operands {b0, b1} of 8 columns each, from a tile whose rows are the columns of the result.
  // `address` comes from right_address; row is a multiple of 16.
  __device__ __forceinline__ static void load_right(uint32_t (&b)[4], uint32_t tile, uint32_t lane, int row,
                                                    int step) {
    ptx::ldmatrix_x4(b, along_row(lane, step) + tile + row * kRowBytes);
  }
  // One left operand: `address` comes from left_address.
  __device__ __forceinline__ static void load_left(Operand& a, uint32_t address, int row, int step) {
    ptx::ldmatrix_x4(a, along_row(address, step) + row * kRowBytes);
  }
  // Two right operands of 8 columns each, columns 16 * pair on, from a tile whose rows are summed over, rows
  // kStep * step on. `address` comes from transposed_address.
  __device__ __forceinline__ static uint32_t transposed_address(uint32_t tile, int lane) {
    if constexpr (sizeof(T) == 2) return left_address(tile, lane);
    return tile + offset(2 * (lane & 3), lane >> 4) + ((lane >> 2) & 3) * 4;
  }
  __device__ __forceinline__ static void load_transposed(uint32_t (&b)[4], uint32_t tile, uint32_t address,
                                                         int step, int pair) {
    if constexpr (sizeof(T) == 2) {
      ptx::ldmatrix_x4_trans(b, along_row(address, pair) + tile + step * 16 * kRowBytes);
    } else {
      // Row 2t + 1 is permuted like row 2t but for the lowest bit of the chunk (a row holds 8 chunks or more
      // of fp32).
      static_assert(sizeof(T) == 2 || kPeriod == 8);
      for (int half = 0; half < 2; ++half) {
        const uint32_t even = along_row(address, 2 * pair + half) + tile + step * 8 * kRowBytes;
        b[2 * half] = ptx::load_shared_32(even);
        b[2 * half + 1] = ptx::load_shared_32((even ^ 16) + kRowBytes);
      }
    }
  }
};

}  // namespace fastattn
