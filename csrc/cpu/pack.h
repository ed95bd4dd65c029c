// From the caller's tensors (any of three dtypes, any strides) to the operands of gemm.h, and back.
//
// - rows: row-major units, zero-padded to a whole vector: the A operand, and for fp32 also B with K = rows
// - interleave: for bf16 pairs, two neighbouring rows in each unit: B with K = rows
// - panels: the transpose of rows, in panels of kNR: B with K = head_dim
//
// No load reaches beyond the last element of a row: tails go through a zeroed buffer.
#ifndef FASTATTN_CPU_PACK_H
#define FASTATTN_CPU_PACK_H

#include "gemm.h"
#include "problem.h"
#include "transpose.h"

namespace fastattn::FASTATTN_ISA_NS {

// Storage types: one empty tag per dtype with its lane conversions.
struct F32 {
  typedef float Storage;
  FASTATTN_ALWAYS vf load(const float* p) { return load_as<vf>(p); }
  FASTATTN_ALWAYS void store_to(float* p, vf x) { store(p, x); }
};
struct F16 {
  typedef uint16_t Storage;
  FASTATTN_ALWAYS vf load(const uint16_t* p) { return from_f16(load_as<vu16>(p)); }
  FASTATTN_ALWAYS void store_to(uint16_t* p, vf x) { store(p, to_f16(x)); }
};
struct BF16 {
  typedef uint16_t Storage;
  FASTATTN_ALWAYS vf load(const uint16_t* p) { return from_bf16(load_as<vu16>(p)); }
  FASTATTN_ALWAYS void store_to(uint16_t* p, vf x) { store(p, to_bf16(x)); }
};

template <class T>
FASTATTN_ALWAYS vf load_tail(const typename T::Storage* p, int64_t n) {
  typename T::Storage buffer[W] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return T::load(buffer);
}
template <class T>
FASTATTN_ALWAYS void store_tail(typename T::Storage* p, vf x, int64_t n) {
  typename T::Storage buffer[W];
  T::store_to(buffer, x);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

// One row to fp32, zero-padded to `padded` lanes.
template <class T>
FASTATTN_ALWAYS void load_row(const typename T::Storage* source, int64_t n, float* row, int64_t padded) {
  int64_t d = 0;
  for (; d + W <= n; d += W) store(row + d, T::load(source + d));
  if (d < n) store(row + d, load_tail<T>(source + d, n - d)), d += W;
  for (; d < padded; d += W) store(row + d, vf{});
}
// fp32 times `factor` to one row of the caller's.
template <class T>
FASTATTN_ALWAYS void store_row(const float* row, float factor, int64_t n, typename T::Storage* target) {
  int64_t d = 0;
  for (; d + W <= n; d += W) T::store_to(target + d, load(row + d) * factor);
  if (d < n) store_tail<T>(target + d, load(row + d) * factor, n - d);
}

template <class A, class B>
struct SameType {
  static constexpr bool value = false;
};
template <class A>
struct SameType<A, A> {
  static constexpr bool value = true;
};

// Whether fp32 rows can serve as B where they lie: dense, whole vectors, and spread over enough of L1's sets
// (64 sets of 8 lines; rows a power of two apart share few) that a panel of `count` rows stays there. Else a
// copy pays.
FASTATTN_ALWAYS bool rows_in_place(int64_t stride, int64_t n, int64_t count) {
  const int64_t lines = n / 16;
  return stride == n && n % 16 == 0 && count * (lines & -lines) <= 256;
}

template <class T, class E>
struct Packer;

template <class T>
struct Packer<T, Single> {
  // (rows, n) to row-major units; rows where keep is 0 become zero (keep may be null).
  static void rows(const typename T::Storage* source, int64_t stride, int64_t count, int64_t n,
                   const int32_t* keep, float* units, int64_t ld, int64_t padded) {
    for (int64_t i = 0; i < count; ++i) {
      const bool wanted = keep == nullptr || keep[i] != 0;
      load_row<T>(source + i * stride, wanted ? n : 0, units + i * ld, padded);
    }
  }
  static void interleave(const typename T::Storage* source, int64_t stride, int64_t count, int64_t n,
                         const int32_t* keep, float* units, int64_t ld, int64_t padded) {
    rows(source, stride, count, n, keep, units, ld, padded);
  }
};

#if defined(FASTATTN_BF16_DOT)
// Narrower elements as they are, fp32 rounded.
template <class T>
struct Packer<T, Pair> {
  typedef typename T::Storage Storage;
  static void rows(const Storage* source, int64_t stride, int64_t count, int64_t n, const int32_t* keep,
                   uint32_t* units, int64_t ld, int64_t padded) {
    for (int64_t i = 0; i < count; ++i) {
      const bool wanted = keep == nullptr || keep[i] != 0;
      uint16_t* row = (uint16_t*)(units + i * ld);
      const int64_t used = wanted ? n : 0;
      copy_row(source + i * stride, used, row);
      __builtin_memset(row + used, 0, (size_t)(padded * 2 - used) * 2);
    }
  }
  static void interleave(const Storage* source, int64_t stride, int64_t count, int64_t n, const int32_t* keep,
                         uint32_t* units, int64_t ld, int64_t padded) {
    for (int64_t i = 0; i < count; i += 2) {
      const Storage* even = source + i * stride;
      const Storage* odd = even + stride;
      const bool want_even = keep == nullptr || keep[i] != 0;
      const bool want_odd = i + 1 < count && (keep == nullptr || keep[i + 1] != 0);
      uint32_t* row = units + i / 2 * ld;
      for (int64_t d = 0; d < padded; d += W) {
        const int64_t left = n - d;
        store(row + d, join(lanes(even, d, want_even ? left : 0), lanes(odd, d, want_odd ? left : 0)));
      }
    }
  }

 private:
  static void copy_row(const uint16_t* from, int64_t n, uint16_t* to) {
    __builtin_memcpy(to, from, (size_t)n * 2);
  }
  static void copy_row(const float* from, int64_t n, uint16_t* to) {
    int64_t d = 0;
    for (; d + W <= n; d += W) BF16::store_to(to + d, load(from + d));
    if (d < n) store_tail<BF16>(to + d, load_tail<F32>(from + d, n - d), n - d);
  }
  FASTATTN_ALWAYS vf lanes(const float* row, int64_t d, int64_t left) {
    return left >= W ? load(row + d) : left > 0 ? load_tail<F32>(row + d, left) : vf{};
  }
  FASTATTN_ALWAYS vu lanes(const uint16_t* row, int64_t d, int64_t left) {
    if (left >= W) return __builtin_convertvector(load_as<vu16>(row + d), vu);
    return left > 0 ? as_uint(load_tail<BF16>(row + d, left)) >> 16 : vu{};
  }
  FASTATTN_ALWAYS vu join(vf even, vf odd) { return pair_bf16(even, odd); }
  FASTATTN_ALWAYS vu join(vu even, vu odd) { return even | odd << 16; }
};
#endif

// ---- transposition --------------------------------------------------------------------------

// One W x W block of panels: units [d, d + W) of W rows that load(i) yields.
template <class Unit, class Load>
FASTATTN_ALWAYS void transpose_block(Unit* panel, int64_t d, int64_t n, Load load_row_at) {
  vf x[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) x[i] = load_row_at(i);
  butterfly<W / 2>(x);
  if (d + W <= n) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) store(panel + (d + i) * kNR, x[i]);
  } else {
    for (int i = 0; d + i < n; ++i) store(panel + (d + i) * kNR, x[i]);
  }
}

// (count, n) elements to panels of kNR columns with ld = kNR: unit (d, row), with K = head_dim in units. Rows
// where keep is 0, and columns from count to the next multiple of W, are zero.
template <class T, class E>
struct Panels;

template <class T>
struct Panels<T, Single> {
  static void pack(const typename T::Storage* source, int64_t stride, int64_t count, int64_t n,
                   const int32_t* keep, float* panels, float*) {
    for (int64_t r = 0; r < count; r += W) {
      float* panel = panels + r / kNR * n * kNR + r % kNR;
      const typename T::Storage* rows = source + r * stride;
      bool whole = r + W <= count;
      if (keep != nullptr)
        for (int i = 0; i < W; ++i) whole &= r + i < count && keep[r + i] != 0;
      int64_t d = 0;
      if (whole)
        for (; d + W <= n; d += W)
          transpose_block(panel, d, n, [&](int i) { return T::load(rows + i * stride + d); });
      for (; d < n; d += W)
        transpose_block(panel, d, n, [&](int i) {
          if (r + i >= count || (keep != nullptr && keep[r + i] == 0)) return vf{};
          const typename T::Storage* row = rows + i * stride + d;
          return n - d >= W ? T::load(row) : load_tail<T>(row, n - d);
        });
    }
  }
};

#if defined(FASTATTN_BF16_DOT)
template <class T>
struct Panels<T, Pair> {
  // By way of `staging`, zero-padded rows of pairs.
  static void pack(const typename T::Storage* source, int64_t stride, int64_t count, int64_t n,
                   const int32_t* keep, uint32_t* panels, uint32_t* staging) {
    const int64_t depth = (n + 1) / 2, padded = (depth + W - 1) / W * W;
    Packer<T, Pair>::rows(source, stride, count, n, keep, staging, padded, padded);
    for (int64_t r = 0; r < count; r += W) {
      uint32_t* panel = panels + r / kNR * depth * kNR + r % kNR;
      for (int64_t d = 0; d < depth; d += W)
        transpose_block(panel, d, depth, [&](int i) {
          return r + i < count ? load_as<vf>(staging + (r + i) * padded + d) : vf{};
        });
    }
  }
};
#endif

// ---- weights as operands ---------------------------------------------------------------------

constexpr int kScoreLd = kKeyTile + 16;  // an odd number of cache lines, so that rows do not share L1 sets

// fp32 scores become A operands: in place for fp32 units, as bf16 by rows or by pairs of rows otherwise. What
// by_columns yields has unit (i, k), of column i and row or pair k, at [k * kColumnsLd + i] if kByColumns,
// else at [i * kColumnsLd + k].
template <class E>
struct Weights;

template <>
struct Weights<Single> {
  static constexpr bool kByColumns = true;
  static constexpr int kColumnsLd = kScoreLd;
  static constexpr int kColumnsUnits = 0;  // of a buffer
  static const float* by_rows(const float* tile, int64_t, int, int, float*, int64_t) { return tile; }
  static const float* by_columns(const float* tile, int64_t, int, int, float*) { return tile; }
};

#if defined(FASTATTN_BF16_DOT)
template <>
struct Weights<Pair> {
  // K = columns: each row in bf16; columns is a multiple of W.
  static const uint32_t* by_rows(const float* tile, int64_t ld, int rows, int columns, uint32_t* units,
                                 int64_t units_ld) {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; j += W)
        store((uint16_t*)(units + i * units_ld) + j, to_bf16(load(tile + i * ld + j)));
    return units;
  }
  // K = rows: a unit holds rows 2i and 2i + 1 of one column; a missing last row counts as zero.
  static vu row_pair(const float* tile, int64_t ld, int rows, int i, int column) {
    const float* even = tile + i * ld + column;
    return pair_bf16(i < rows ? load(even) : vf{}, i + 1 < rows ? load(even + ld) : vf{});
  }
#if defined(FASTATTN_AMX)  // tiles load rows, so the transpose is made here, once
  static constexpr bool kByColumns = false;
  static constexpr int kColumnsLd = kQueryTile / 2 + 16;  // an odd number of cache lines
  static constexpr int kColumnsUnits = kKeyTile * kColumnsLd;
  static const uint32_t* by_columns(const float* tile, int64_t ld, int rows, int columns, uint32_t* units) {
    for (int i = 0; i < rows; i += 2 * W)
      for (int j = 0; j < columns; j += W) {
        vf x[W];
#pragma GCC unroll 16
        for (int k = 0; k < W; ++k) x[k] = as_float(row_pair(tile, ld, rows, i + 2 * k, j));
        butterfly<W / 2>(x);
#pragma GCC unroll 16
        for (int k = 0; k < W; ++k) store(units + (j + k) * kColumnsLd + i / 2, x[k]);
      }
    return units;
  }
#else
  static constexpr bool kByColumns = true;
  static constexpr int kColumnsLd = kScoreLd;
  static constexpr int kColumnsUnits = kQueryTile / 2 * kColumnsLd;
  static const uint32_t* by_columns(const float* tile, int64_t ld, int rows, int columns, uint32_t* units) {
    for (int i = 0; i < rows; i += 2)
      for (int j = 0; j < columns; j += W)
        store(units + i / 2 * kColumnsLd + j, row_pair(tile, ld, rows, i, j));
    return units;
  }
#endif
};
#endif

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_PACK_H
