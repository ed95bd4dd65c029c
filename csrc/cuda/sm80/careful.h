// Keeps NaN and infinity in masked-out values from reaching the rows that do not see them. The matrix
// instruction makes NaN of a zero weight times such a value. So when a result is not finite, the block runs
// once more, and each step first replaces the offending elements of the summed tile by zeros and notes their
// place; afterwards the rows that see one become NaN. The plain pass pays for none of this.
#pragma once

#include "mask.h"
#include "matmul.h"

namespace fastattn {

template <typename Tile>
struct Cleaner {
  static constexpr int kWords = (Tile::kRows + 31) / 32;
  static constexpr int kBytes = Tile::kCols * kWords * 4;

  // Bit r of notes[column] says that row r of the column was not finite and is now 0. Each thread takes
  // columns.
  template <int kThreads>
  __device__ __forceinline__ static void clean(uint32_t tile, uint32_t* notes) {
    using T = typename Tile::T;
#pragma unroll 1
    for (int col = threadIdx.x; col < Tile::kCols; col += kThreads) {
#pragma unroll 1
      for (int word = 0; word < kWords; ++word) {
        uint32_t note = 0;
#pragma unroll 1
        for (int row = 32 * word; row < min(32 * word + 32, Tile::kRows); ++row) {
          const uint32_t at = tile + Tile::offset(row, col / Tile::kElementsPerChunk) +
                              col % Tile::kElementsPerChunk * int(sizeof(T));
          if constexpr (sizeof(T) == 2) {
            if ((ptx::load_shared_16(at) & 0x7fffu) < Element<T>::kInfinity) continue;
            ptx::store_shared_16(at, 0);
          } else {
            if ((ptx::load_shared_32(at) & 0x7fffffffu) < Element<T>::kInfinity) continue;
            ptx::store_shared_32(at, 0);
          }
          note |= 1u << row % 32;
        }
        notes[col * kWords + word] = note;
      }
    }
  }

  // acc[m][n] of queries row + 16 m (as the lane has them): NaN where a noted key, of those `keys` lets
  // through, is seen.
  template <int kM, int kTiles>
  __device__ __forceinline__ static void spoil(float (&acc)[kM][kTiles][4], const uint32_t* notes,
                                               const KeyBits<Tile::kRows>& keys, const Band& band, int row,
                                               int first_key) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = row + 16 * m + 8 * half;
        __syncwarp();  // notes are read again rather than kept in registers for the other half
#pragma unroll
        for (int word = 0; word < kWords; ++word) {
          // The keys of this word that query i sees: bits from .. to - 1.
          const int first = first_key + 32 * word;
          const int from = max(0, min(32, i + band.low - first)),
                    to = max(0, min(32, i + band.high + 1 - first));
          const uint32_t seen = keys.words[word] & low_bits(to) & ~low_bits(from);
#pragma unroll
          for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int col = 8 * n + threadIdx.x % 4 * 2 + e;
              if (notes[col * kWords + word] & seen) acc[m][n][2 * half + e] = __int_as_float(0x7fffffff);
            }
        }
      }
  }

 private:
  __device__ __forceinline__ static uint32_t low_bits(int n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }
};

}  // namespace fastattn
