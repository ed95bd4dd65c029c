// The one matrix product of the library: C[M x N] (+)= A[M x K] B[K x N] in tiles that sit in cache.
//
// Operands are made of 32-bit units. For fp32 a unit is one float; for the bf16 dot product it is two
// neighbours along K, so K counts pairs, and nothing else differs. C is always fp32. An operand split in two
// parts has the second part of each of its rows half a leading dimension behind the first.
//
//   B    panels of kNR columns: unit (k, n) of a panel at b[k * ld + n], its columns contiguous and aligned
//   A    by rows (unit (i, k) at a[i * ld + k]) or by columns (at a[k * ld + i]), each unit broadcast
//
// A micro-kernel keeps a block of up to 6 rows x kNR columns of C in registers for the whole of K: per step
// kNV loads of B and 6 broadcasts of A feed 6 * kNV multiply-adds (Goto and van de Geijn 2008). Where bf16
// has matrix registers, amx_gemm.h takes its products from the same operands.
#ifndef FASTATTN_CPU_GEMM_H
#define FASTATTN_CPU_GEMM_H

#include "vec.h"

namespace fastattn::FASTATTN_ISA_NS {

struct Range {
  int begin, end;
};

}  // namespace fastattn::FASTATTN_ISA_NS

#if defined(FASTATTN_AMX)
#include "amx_gemm.h"
#endif

namespace fastattn::FASTATTN_ISA_NS {

// 16 vector registers hold 6 x 2 sums, 2 of B and a broadcast; 32 hold 6 x 4 sums, 4 of B and a broadcast.
#if FASTATTN_VECTOR_BYTES == 64 || defined(__ARM_NEON)
constexpr int kNV = 4;
#else
constexpr int kNV = 2;
#endif
constexpr int kMR = 6;
constexpr int kNR = kNV * W;
template <class E>
constexpr int kPanelLd = E::kParts * kNR;

// Element policies: what a unit is, the multiply-add on it, the elements that lie in it, and in how many
// parts.
struct Single {
  typedef float Unit, Cell;
  typedef vf Vector;
  static constexpr int kPerUnit = 1, kParts = 1;
  FASTATTN_ALWAYS vf dot(vf sum, vf a, vf b) { return a * b + sum; }
};

#if defined(FASTATTN_BF16_DOT)
// Elements in bf16, or as sums of two bf16 numbers.
template <int kPartCount>
struct Pairs {
  typedef uint32_t Unit;
  typedef uint16_t Cell;
  typedef vu Vector;
  static constexpr int kPerUnit = 2, kParts = kPartCount;
  FASTATTN_ALWAYS vf dot(vf sum, vu a, vu b) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return (vf)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
#else  // the same in software, so that layouts can be tested where the instruction is missing
    sum = as_float(a & 0xFFFF0000u) * as_float(b & 0xFFFF0000u) + sum;
    return as_float(a << 16) * as_float(b << 16) + sum;
#endif
  }
};
typedef Pairs<1> Pair;
#if defined(FASTATTN_AMX)
// Three products for one: that pays where they are taken in tiles.
typedef Pairs<2> Split;
#endif
#endif

template <class E, int MR, int NV, bool kByColumns>
__attribute__((noinline)) void micro_kernel(int64_t k_count, const typename E::Unit* a, int64_t lda,
                                            const typename E::Unit* b, int64_t ldb, float* c, int64_t ldc,
                                            bool accumulate) {
  vf sum[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[i][v] = vf{};
#pragma GCC unroll 2
  for (int64_t k = 0; k < k_count; ++k) {
    typename E::Vector row[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) row[v] = load_as<typename E::Vector>(b + v * W);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const typename E::Vector ai = splat(kByColumns ? a[i] : a[i * lda]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) sum[i][v] = E::dot(sum[i][v], ai, row[v]);
    }
    a += kByColumns ? lda : 1;
    b += ldb;
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* out = c + i * ldc + v * W;
      store(out, accumulate ? load(out) + sum[i][v] : sum[i][v]);
    }
}

template <class E>
using MicroKernel = void (*)(int64_t, const typename E::Unit*, int64_t, const typename E::Unit*, int64_t,
                             float*, int64_t, bool);

template <class E, bool kByColumns>
struct MicroKernels {
#define FASTATTN_ROW(NV)                                                      \
  {                                                                           \
      micro_kernel<E, 1, NV, kByColumns>, micro_kernel<E, 2, NV, kByColumns>, \
      micro_kernel<E, 3, NV, kByColumns>, micro_kernel<E, 4, NV, kByColumns>, \
      micro_kernel<E, 5, NV, kByColumns>, micro_kernel<E, 6, NV, kByColumns>}
  static constexpr MicroKernel<E> table[kNV][kMR] = {FASTATTN_ROW(1), FASTATTN_ROW(2),
#if FASTATTN_VECTOR_BYTES == 64 || defined(__ARM_NEON)
                                                     FASTATTN_ROW(3), FASTATTN_ROW(4)
#endif
  };
#undef FASTATTN_ROW
};

// How many of the `left` rows the next block takes: 6, but never leaving a block of 1 or 2 that would starve
// the multipliers.
FASTATTN_ALWAYS int block_rows(int left) {
  return left >= 2 * kMR ? kMR : left <= kMR ? left : (left + 1) / 2;
}

template <class E, bool kByColumns, class RowsOf, class ColumnsOf, class DepthOf>
FASTATTN_ALWAYS void vector_gemm(int n_count, const typename E::Unit* a, int64_t lda,
                                 const typename E::Unit* b, int64_t panel_stride, int64_t ldb, float* c,
                                 int64_t ldc, bool accumulate, RowsOf rows_of, ColumnsOf columns_of,
                                 DepthOf depth_of) {
  for (int n = 0; n < n_count; n += kNR, b += panel_stride) {
    const int columns = n_count - n < kNR ? n_count - n : kNR;
    const Range rows = rows_of(n, n + columns);
    for (int i = rows.begin; i < rows.end;) {
      const int m = block_rows(rows.end - i);
      const Range depth = depth_of(i, i + m), wanted = columns_of(i, i + m);
      const int first = wanted.begin > n ? (wanted.begin - n) / W * W : 0;
      const int count = (wanted.end - n < columns ? wanted.end - n : columns) - first;
      if (count > 0 && (depth.begin < depth.end || !accumulate)) {
        const int64_t k = depth.end > depth.begin ? depth.end - depth.begin : 0;
        MicroKernels<E, kByColumns>::table[(count + W - 1) / W - 1][m - 1](
            k, a + (kByColumns ? i + depth.begin * lda : i * lda + depth.begin), lda,
            b + depth.begin * ldb + first, ldb, c + i * ldc + n + first, ldc, accumulate);
      }
      i += m;
    }
  }
}

// rows_of(n0, n1): the rows that are needed of columns n0..n1; columns_of(i0, i1): the columns that are
// needed of rows i0..i1; depth_of(i0, i1): the part of K that these rows have anything in. Masks shrink all
// of them; with no mask they are the whole.
template <class E, bool kByColumns, class RowsOf, class ColumnsOf, class DepthOf>
FASTATTN_ALWAYS void gemm(int n_count, const typename E::Unit* a, int64_t lda, const typename E::Unit* b,
                          int64_t panel_stride, int64_t ldb, float* c, int64_t ldc, bool accumulate,
                          RowsOf rows_of, ColumnsOf columns_of, DepthOf depth_of) {
#if defined(FASTATTN_AMX)
  if constexpr (E::kPerUnit == 2 && !kByColumns)
    amx_gemm<E::kParts>(n_count, a, lda, b, panel_stride, ldb, c, ldc, accumulate, rows_of, depth_of);
  else
#endif
    vector_gemm<E, kByColumns>(n_count, a, lda, b, panel_stride, ldb, c, ldc, accumulate, rows_of, columns_of,
                               depth_of);
}

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_GEMM_H
