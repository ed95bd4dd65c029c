// The product of gemm.h for bf16 pairs in AMX tiles, which load A by rows and B as they are packed for the
// dot product.
//
// Four tiles of C, 32 x 32, stay in registers for the whole of K: a step of 16 units loads two tiles of A and
// two of B for four products. Of elements split in two parts three such products are taken, all but that of
// the second parts. Blocks that are not full go through zero-filled copies, because what lies
// beyond an operand's end may be NaN.
#ifndef FASTATTN_CPU_AMX_GEMM_H
#define FASTATTN_CPU_AMX_GEMM_H

#include "amx.h"

namespace fastattn::FASTATTN_ISA_NS {

struct alignas(64) TileCopy {
  vu rows[kTileRows];
};

// Where a tile is to be loaded from.
struct TileSource {
  const uint32_t* from;
  int64_t stride;
};

// Units (i, k) of A, i < rows, k < depth.
FASTATTN_ALWAYS TileSource tile_of_a(const uint32_t* a, int64_t lda, int rows, int64_t depth,
                                     TileCopy& copy) {
  if (rows >= kTileRows && depth >= W) return {a, lda};
  const vi wanted = lane_index() < (int32_t)(depth < W ? depth : W);
  for (int i = 0; i < kTileRows; ++i) copy.rows[i] = i < rows ? load_as<vu>(a + i * lda) & (vu)wanted : vu{};
  return {(const uint32_t*)copy.rows, W};
}

// Units (k, n) of B, k < depth.
FASTATTN_ALWAYS TileSource tile_of_b(const uint32_t* b, int64_t ldb, int64_t depth, TileCopy& copy) {
  if (depth >= kTileRows) return {b, ldb};
  for (int k = 0; k < kTileRows; ++k) copy.rows[k] = k < depth ? load_as<vu>(b + k * ldb) : vu{};
  return {(const uint32_t*)copy.rows, W};
}

// C[rows x columns] (+)= A B: rows 1..32, columns 16 or 32.
template <int kParts>
__attribute__((noinline)) void amx_block(int rows, int columns, int64_t depth, const uint32_t* a, int64_t lda,
                                         const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                                         bool accumulate) {
  const bool below = rows > kTileRows, beside = columns > kTileRows;
  const int rows0 = below ? kTileRows : rows, rows1 = rows - kTileRows;
  float* const c1 = c + kTileRows * ldc;
  TileCopy copy[4];

#define FASTATTN_TILE_BEGIN(t, to, count)   \
  do {                                      \
    if (accumulate && (count) == kTileRows) \
      FASTATTN_TILE_LOAD(t, to, ldc);       \
    else                                    \
      FASTATTN_TILE_ZERO(t);                \
  } while (0)
  FASTATTN_TILE_BEGIN(0, c, rows0);
  if (beside) FASTATTN_TILE_BEGIN(1, c + W, rows0);
  if (below) FASTATTN_TILE_BEGIN(2, c1, rows1);
  if (below && beside) FASTATTN_TILE_BEGIN(3, c1 + W, rows1);

  const auto add_products = [&](const uint32_t* a0, const uint32_t* b0, int64_t left) {
    const TileSource upper = tile_of_a(a0, lda, rows0, left, copy[0]);
    const TileSource first = tile_of_b(b0, ldb, left, copy[1]);
    FASTATTN_TILE_LOAD(4, upper.from, upper.stride);
    FASTATTN_TILE_LOAD(6, first.from, first.stride);
    FASTATTN_TILE_DOT(0, 4, 6);
    if (beside) {
      const TileSource second = tile_of_b(b0 + W, ldb, left, copy[2]);
      FASTATTN_TILE_LOAD(7, second.from, second.stride);
      FASTATTN_TILE_DOT(1, 4, 7);
    }
    if (!below) return;
    const TileSource lower = tile_of_a(a0 + kTileRows * lda, lda, rows1, left, copy[3]);
    FASTATTN_TILE_LOAD(5, lower.from, lower.stride);
    FASTATTN_TILE_DOT(2, 5, 6);
    if (beside) FASTATTN_TILE_DOT(3, 5, 7);
  };
  for (int64_t k = 0; k < depth; k += W) {
    const uint32_t* const a0 = a + k;
    const uint32_t* const b0 = b + k * ldb;
    add_products(a0, b0, depth - k);
    if constexpr (kParts == 2) {
      add_products(a0 + lda / 2, b0, depth - k);
      add_products(a0, b0 + ldb / 2, depth - k);
    }
  }

#define FASTATTN_TILE_END(t, to, count)                                       \
  do {                                                                        \
    if ((count) == kTileRows) {                                               \
      FASTATTN_TILE_STORE(t, to, ldc);                                        \
    } else {                                                                  \
      FASTATTN_TILE_STORE(t, copy[0].rows, W);                                \
      for (int i = 0; i < (count); ++i) {                                     \
        const vf sum = (vf)copy[0].rows[i];                                   \
        store((to) + i * ldc, accumulate ? load((to) + i * ldc) + sum : sum); \
      }                                                                       \
    }                                                                         \
  } while (0)
  FASTATTN_TILE_END(0, c, rows0);
  if (beside) FASTATTN_TILE_END(1, c + W, rows0);
  if (below) FASTATTN_TILE_END(2, c1, rows1);
  if (below && beside) FASTATTN_TILE_END(3, c1 + W, rows1);
#undef FASTATTN_TILE_BEGIN
#undef FASTATTN_TILE_END
}

// As gemm() in gemm.h, A by rows; panels of B are kNR = 4 * W columns wide.
template <int kParts, class RowsOf, class DepthOf>
FASTATTN_ALWAYS void amx_gemm(int n_count, const uint32_t* a, int64_t lda, const uint32_t* b,
                              int64_t panel_stride, int64_t ldb, float* c, int64_t ldc, bool accumulate,
                              RowsOf rows_of, DepthOf depth_of) {
  constexpr int kBlock = 2 * kTileRows, kBlocksPerPanel = 2;
  for (int n = 0; n < n_count; n += kBlock) {
    const int columns = n_count - n < kBlock ? n_count - n : kBlock, block = n / kBlock;
    const uint32_t* const panel =
        b + block / kBlocksPerPanel * panel_stride + block % kBlocksPerPanel * kBlock;
    const Range rows = rows_of(n, n + columns);
    for (int i = rows.begin; i < rows.end; i += kBlock) {
      const int m = rows.end - i < kBlock ? rows.end - i : kBlock;
      const Range depth = depth_of(i, i + m);
      if (depth.begin >= depth.end && accumulate) continue;
      amx_block<kParts>(m, columns, depth.end - depth.begin, a + i * lda + depth.begin, lda,
                        panel + depth.begin * ldb, ldb, c + i * ldc + n, ldc, accumulate);
    }
  }
}

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_AMX_GEMM_H
