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

// Whether rows of n elements can serve as A where they lie: dense, and for pairs whole vectors of them, on
// the addresses of pairs.
template <class T, class E>
FASTATTN_ALWAYS bool units_in_place(const fastattn_tensor& t, int64_t n) {
  if (t.stride_n != n) return false;
  if (SameType<typename T::Storage, typename E::Unit>::value) return true;
  return E::kParts == 1 && SameType<T, BF16>::value && SameType<typename E::Cell, uint16_t>::value &&
         n % (2 * W) == 0 && (t.stride_b | t.stride_h) % 2 == 0 && (uintptr_t)t.data % sizeof(uint32_t) == 0;
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
// Of x as a sum of bf16 numbers: x itself, to be rounded, or what its rounding leaves. What rounds to an
// infinity leaves nothing.
template <int kPart>
FASTATTN_ALWAYS vf part_of(vf x) {
  if constexpr (kPart == 0) return x;
  const vf rest = x - from_bf16(to_bf16(x));
  return rest - rest == 0.0f ? rest : vf{};
}

// Narrower elements as they are, fp32 rounded or split.
template <class T, int kParts>
struct Packer<T, Pairs<kParts>> {
  typedef typename T::Storage Storage;
  static void rows(const Storage* source, int64_t stride, int64_t count, int64_t n, const int32_t* keep,
                   uint32_t* units, int64_t ld, int64_t padded) {
    part_of_rows<0>(source, stride, count, n, keep, units, ld, padded);
    if constexpr (kParts == 2) part_of_rows<1>(source, stride, count, n, keep, units + ld / 2, ld, padded);
  }
  static void interleave(const Storage* source, int64_t stride, int64_t count, int64_t n, const int32_t* keep,
                         uint32_t* units, int64_t ld, int64_t padded) {
    interleave_part<0>(source, stride, count, n, keep, units, ld, padded);
    if constexpr (kParts == 2) interleave_part<1>(source, stride, count, n, keep, units + ld / 2, ld, padded);
  }

 private:
  template <int kPart>
  static void part_of_rows(const Storage* source, int64_t stride, int64_t count, int64_t n,
                           const int32_t* keep, uint32_t* units, int64_t ld, int64_t padded) {
    for (int64_t i = 0; i < count; ++i) {
      const bool wanted = keep == nullptr || keep[i] != 0;
      uint16_t* row = (uint16_t*)(units + i * ld);
      const int64_t used = wanted ? n : 0;
      copy_row<kPart>(source + i * stride, used, row);
      __builtin_memset(row + used, 0, (size_t)(padded * 2 - used) * 2);
    }
  }
  template <int kPart>
  static void interleave_part(const Storage* source, int64_t stride, int64_t count, int64_t n,
                              const int32_t* keep, uint32_t* units, int64_t ld, int64_t padded) {
    for (int64_t i = 0; i < count; i += 2) {
      const Storage* even = source + i * stride;
      const Storage* odd = even + stride;
      const bool want_even = keep == nullptr || keep[i] != 0;
      const bool want_odd = i + 1 < count && (keep == nullptr || keep[i + 1] != 0);
      uint32_t* row = units + i / 2 * ld;
      for (int64_t d = 0; d < padded; d += W) {
        const int64_t left = n - d;
        store(row + d,
              join(lanes<kPart>(even, d, want_even ? left : 0), lanes<kPart>(odd, d, want_odd ? left : 0)));
      }
    }
  }
  template <int kPart>
  static void copy_row(const uint16_t* from, int64_t n, uint16_t* to) {
    __builtin_memcpy(to, from, (size_t)n * 2);
  }
  template <int kPart>
  static void copy_row(const float* from, int64_t n, uint16_t* to) {
    int64_t d = 0;
    for (; d + W <= n; d += W) BF16::store_to(to + d, part_of<kPart>(load(from + d)));
    if (d < n) store_tail<BF16>(to + d, part_of<kPart>(load_tail<F32>(from + d, n - d)), n - d);
  }
  template <int kPart>
  FASTATTN_ALWAYS vf lanes(const float* row, int64_t d, int64_t left) {
    return left >= W  ? part_of<kPart>(load(row + d))
           : left > 0 ? part_of<kPart>(load_tail<F32>(row + d, left))
                      : vf{};
  }
  template <int kPart>
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
FASTATTN_ALWAYS void transpose_block(Unit* panel, int64_t ld, int64_t d, int64_t n, Load load_row_at) {
  vf x[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) x[i] = load_row_at(i);
  butterfly<W / 2>(x);
  if (d + W <= n) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) store(panel + (d + i) * ld, x[i]);
  } else {
    for (int i = 0; d + i < n; ++i) store(panel + (d + i) * ld, x[i]);
  }
}

// (count, n) elements to panels of kNR columns with ld = kPanelLd: unit (d, row), with K = head_dim in units.
// Rows where keep is 0, and columns from count to the next multiple of W, are zero.
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
          transpose_block(panel, kNR, d, n, [&](int i) { return T::load(rows + i * stride + d); });
      for (; d < n; d += W)
        transpose_block(panel, kNR, d, n, [&](int i) {
          if (r + i >= count || (keep != nullptr && keep[r + i] == 0)) return vf{};
          const typename T::Storage* row = rows + i * stride + d;
          return n - d >= W ? T::load(row) : load_tail<T>(row, n - d);
        });
    }
  }
};

#if defined(FASTATTN_BF16_DOT)
template <class T, int kParts>
struct Panels<T, Pairs<kParts>> {
  // bf16 rows of whole vectors from where they lie, others by way of `staging`, zero-padded rows of pairs.
  static void pack(const typename T::Storage* source, int64_t stride, int64_t count, int64_t n,
                   const int32_t* keep, uint32_t* panels, uint32_t* staging) {
    constexpr int kLd = kPanelLd<Pairs<kParts>>;
    const int64_t depth = (n + 1) / 2, padded = (depth + W - 1) / W * W;
    const uint16_t* cells = (const uint16_t*)source;
    int64_t ld = stride;
    if (!SameType<T, BF16>::value || kParts == 2 || keep != nullptr || n % (2 * W) != 0) {
      Packer<T, Pairs<kParts>>::rows(source, stride, count, n, keep, staging, kParts * padded, padded);
      cells = (const uint16_t*)staging, ld = 2 * kParts * padded;
    }
    for (int64_t r = 0; r < count; r += W)
      for (int part = 0; part < kParts; ++part) {
        uint32_t* panel = panels + r / kNR * depth * kLd + part * kNR + r % kNR;
        const uint16_t* rows = cells + r * ld + 2 * part * padded;
        for (int64_t d = 0; d < depth; d += W)
          transpose_block(panel, kLd, d, depth,
                          [&](int i) { return r + i < count ? load_as<vf>(rows + i * ld + 2 * d) : vf{}; });
      }
  }
};
#endif

// ---- weights as operands ---------------------------------------------------------------------

constexpr int kScoreLd = kKeyTile + 16;  // an odd number of cache lines, so that rows do not share L1 sets

// fp32 scores become A operands: in place for fp32 units, as bf16 by rows (kRowsLd units long) or by pairs of
// rows otherwise. What by_columns yields has unit (i, k), of column i and row or pair k, at [k * kColumnsLd +
// i] if kByColumns, else at [i * kColumnsLd + k].
template <class E>
struct Weights;

template <>
struct Weights<Single> {
  static constexpr bool kByColumns = true;
  static constexpr int kColumnsLd = kScoreLd;
  static constexpr int kColumnsUnits = 0;  // of a buffer
  static constexpr int kRowsLd = kScoreLd;
  FASTATTN_ALWAYS void store_cells(float* to, vf x) { store(to, x); }
  static const float* by_rows(const float* tile, int64_t, int, int, float*) { return tile; }
  static const float* by_columns(const float* tile, int64_t, int, int, float*) { return tile; }
};

#if defined(FASTATTN_BF16_DOT)
template <int kParts>
struct Weights<Pairs<kParts>> {
  static constexpr int kRowsLd = kParts * (kKeyTile / 2 + 16);  // each part an odd number of cache lines
  FASTATTN_ALWAYS void store_cells(uint16_t* to, vf x) {
    store(to, to_bf16(x));
    if constexpr (kParts == 2) store(to + kRowsLd, to_bf16(part_of<1>(x)));
  }
  // K = columns: each row in bf16; columns is a multiple of W.
  static const uint32_t* by_rows(const float* tile, int64_t ld, int rows, int columns, uint32_t* units) {
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < columns; j += W)
        store_cells((uint16_t*)(units + i * kRowsLd) + j, load(tile + i * ld + j));
    return units;
  }
  // K = rows: a unit holds rows 2i and 2i + 1 of one column; a missing last row counts as zero.
  template <int kPart>
  FASTATTN_ALWAYS vu row_pair(const float* tile, int64_t ld, int rows, int i, int column) {
    const float* even = tile + i * ld + column;
    return pair_bf16(i < rows ? part_of<kPart>(load(even)) : vf{},
                     i + 1 < rows ? part_of<kPart>(load(even + ld)) : vf{});
  }
#if defined(FASTATTN_AMX)  // tiles load rows, so the transpose is made here, once
  static constexpr bool kByColumns = false;
  static constexpr int kColumnsLd = kParts * (kQueryTile / 2 + 16);
  static constexpr int kColumnsUnits = kKeyTile * kColumnsLd;
  static const uint32_t* by_columns(const float* tile, int64_t ld, int rows, int columns, uint32_t* units) {
    part_by_columns<0>(tile, ld, rows, columns, units);
    if constexpr (kParts == 2) part_by_columns<1>(tile, ld, rows, columns, units + kColumnsLd / 2);
    return units;
  }
  template <int kPart>
  static void part_by_columns(const float* tile, int64_t ld, int rows, int columns, uint32_t* units) {
    for (int i = 0; i < rows; i += 2 * W)
      for (int j = 0; j < columns; j += W) {
        vf x[W];
#pragma GCC unroll 16
        for (int k = 0; k < W; ++k) x[k] = as_float(row_pair<kPart>(tile, ld, rows, i + 2 * k, j));
        butterfly<W / 2>(x);
#pragma GCC unroll 16
        for (int k = 0; k < W; ++k) store(units + (j + k) * kColumnsLd + i / 2, x[k]);
      }
  }
#else
  static constexpr bool kByColumns = true;
  static_assert(kParts == 1, "split products are taken in tiles");
  static constexpr int kColumnsLd = kScoreLd;
  static constexpr int kColumnsUnits = kQueryTile / 2 * kColumnsLd;
  static const uint32_t* by_columns(const float* tile, int64_t ld, int rows, int columns, uint32_t* units) {
    for (int i = 0; i < rows; i += 2)
      for (int j = 0; j < columns; j += W)
        store(units + i / 2 * kColumnsLd + j, row_pair<0>(tile, ld, rows, i, j));
    return units;
  }
#endif
};
#endif

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_PACK_H
