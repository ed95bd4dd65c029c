// A score tile: kQueryTile queries against kKeyTile keys, which of its cells count, and the passes that
// prepare the scores. Each feature is a pass over a tile that sits in cache: it costs a few cycles a vector
// where the products cost D / 2 of them, and it leaves the plain path alone.
#ifndef FASTATTN_CPU_TILE_H
#define FASTATTN_CPU_TILE_H

#include "kernels.h"
#include "math.h"
#include "pack.h"

namespace fastattn::FASTATTN_ISA_NS {

// Leading dimension of a row-major operand of n units: whole vectors, and again an odd number of lines.
FASTATTN_ALWAYS int64_t operand_ld(int64_t n) {
  const int64_t lines = ceil_div(n > W ? round_up(n, W) : W, 16);
  return (lines | 1) * 16;
}

// Hands out pieces of the thread's workspace, each on a cache line.
struct Arena {
  uintptr_t next;  // not a pointer: a layout is measured from address 0
  template <class T>
  T* take(int64_t count) {
    T* p = (T*)next;
    next += (uintptr_t)(round_up(count * (int64_t)sizeof(T), 64) + 64);
    return p;
  }
};

// ---- keys -----------------------------------------------------------------------------------

// Keys [begin, begin + count) of a sequence, trimmed to what anyone sees.
struct KeyTile {
  int64_t begin;
  int count;   // 0: nobody sees any of these keys
  int padded;  // count rounded up to whole vectors
  bool holes;  // keep has zeros
  int32_t keep[kKeyTile];
};

// How many of `count` keys there are up to the last that `mask` (may be null) lets through.
FASTATTN_ALWAYS int64_t keys_before_padding(const uint8_t* mask, int64_t count) {
  while (mask != nullptr && count > 0 && mask[count - 1] == 0) --count;
  return count;
}

// The keys of [begin, end) that `mask` (may be null) lets through. begin is a multiple of kDropoutLanes.
inline void trim_key_tile(const uint8_t* mask, int64_t begin, int64_t end, KeyTile& tile) {
  tile.holes = false;
  if (mask != nullptr) {
    while (end > begin && mask[end - 1] == 0) --end;
    int64_t first = begin;
    while (first < end && mask[first] == 0) ++first;
    begin += (first - begin) / kDropoutLanes * kDropoutLanes;
    for (int64_t j = begin; j < end; ++j) {
      tile.keep[j - begin] = mask[j] != 0 ? -1 : 0;
      tile.holes |= mask[j] == 0;
    }
  }
  tile.begin = begin;
  tile.count = end > begin ? (int)(end - begin) : 0;
  tile.padded = (int)round_up(tile.count, W);
  if (tile.holes)
    for (int j = tile.count; j < tile.padded; ++j) tile.keep[j] = 0;
}

// ---- visible cells --------------------------------------------------------------------------

// Row i of a tile sees columns [begin[i], end[i]); both ascend with i. `full`: every row sees every column.
struct TileRows {
  int rows;
  bool full;
  int begin[kQueryTile], end[kQueryTile];

  // false: no row sees anything.
  bool set(const Visibility& visible, int64_t i0, int row_count, const KeyTile& keys) {
    rows = row_count;
    full = true;
    bool any = false;
    for (int i = 0; i < rows; ++i) {
      const int64_t lo = visible.begin(i0 + i) - keys.begin, hi = visible.end(i0 + i) - keys.begin;
      begin[i] = lo < 0 ? 0 : lo > keys.count ? keys.count : (int)lo;
      end[i] = hi < 0 ? 0 : hi > keys.count ? keys.count : (int)hi;
      full &= begin[i] == 0 && end[i] == keys.count;
      any |= begin[i] < end[i];
    }
    return any;
  }
  // Rows that see anything of columns [c0, c1). Counted, not searched for: that takes vectors.
  Range rows_of(int c0, int c1) const {
    if (full) return {0, rows};
    int before = 0, behind = 0;
    for (int i = 0; i < rows; ++i) before += end[i] <= c0, behind += begin[i] >= c1;
    return {before, before < rows - behind ? rows - behind : before};
  }
  // Past it nothing is visible: what the operands of a product must hold, zeros included. `reach`: how far a
  // block of the product may go beyond the last visible column.
  int last_column(const KeyTile& keys, int reach) const {
    const int last = (int)round_up(end[rows - 1] + reach, W);
    return last < keys.padded ? last : keys.padded;
  }
  // Columns that rows [i0, i1) see between them.
  Range columns_of(int i0, int i1) const { return {begin[i0], end[i1 - 1]}; }
};

template <class E>
FASTATTN_ALWAYS Range to_units(Range r) {
  return {r.begin / E::kPerUnit, (r.end + E::kPerUnit - 1) / E::kPerUnit};
}

// Sets what row i does not see to `value`, within the whole vectors that hold [begin, end) of the row.
FASTATTN_ALWAYS void mask_row(float* row, int begin, int end, const KeyTile& keys, float value) {
  const vf hidden = splat(value);
  const int first = begin / W * W, last = (int)round_up(end, W);
  // By whole vectors: who loads one next would wait for narrower stores into it.
  if (first < begin) store(row + first, lane_index() < begin - first ? hidden : load(row + first));
  if (end < last) store(row + last - W, lane_index() < end - (last - W) ? load(row + last - W) : hidden);
  if (keys.holes)
    for (int j = first; j < last; j += W)
      store(row + j, load_as<vi>(keys.keep + j) != 0 ? load(row + j) : hidden);
}

// Rows are zero where they are not visible, so that products may run over any range that covers the visible
// one.
template <class Cell>
FASTATTN_ALWAYS void zero_outside(Cell* row, int begin, int end, int padded) {
  if (begin >= end) begin = end = 0;
  for (int j = 0; j < begin / W * W; j += W) __builtin_memset(row + j, 0, W * sizeof(Cell));
  for (int j = (int)round_up(end, W); j < padded; j += W) __builtin_memset(row + j, 0, W * sizeof(Cell));
}

// Whether every unit of an operand is finite: x - x is 0 then, and NaN otherwise. Second parts always are.
inline bool all_finite(const float* rows, int64_t ld, int count, int64_t n) {
  vf sum = {};
  for (int i = 0; i < count; ++i)
    for (int64_t d = 0; d < n; d += W) {
      const vf x = load(rows + i * ld + d);
      sum += x - x;
    }
  return hsum(sum) == 0.0f;
}
inline bool all_finite(const uint32_t* units, int64_t ld, int count, int64_t n) {
  vf sum = {};
  for (int i = 0; i < (count + 1) / 2; ++i)
    for (int64_t d = 0; d < n; d += W) {
      const vu x = load_as<vu>(units + i * ld + d);
      const vf even = as_float(x << 16), odd = as_float(x & 0xFFFF0000u);
      sum += (even - even) + (odd - odd);
    }
  return hsum(sum) == 0.0f;
}

template <class E>
FASTATTN_ALWAYS float unit_value(const float* units, int64_t ld, int row, int64_t d) {
  return units[row * ld + d];
}
template <class E>
FASTATTN_ALWAYS float unit_value(const uint32_t* units, int64_t ld, int row, int64_t d) {
  float sum = 0.0f;
  for (int part = 0; part < E::kParts; ++part) {
    const uint32_t pair = units[row / 2 * ld + part * ld / 2 + d];
    const uint32_t bits = row % 2 != 0 ? pair & 0xFFFF0000u : pair << 16;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    sum += x;
  }
  return sum;
}

// sums += weights * keys, visiting visible cells alone: the slow way, taken when a key that only some rows
// see holds NaN or inf, which times a zero weight would be NaN.
template <class E>
void add_visible(const TileRows& t, const KeyTile& keys, const float* weights, const typename E::Unit* units,
                 int64_t units_ld, int64_t n, float* sums, int64_t ld) {
  for (int i = 0; i < t.rows; ++i)
    for (int j = t.begin[i]; j < t.end[i]; ++j) {
      if (keys.holes && keys.keep[j] == 0) continue;
      for (int64_t d = 0; d < n; ++d)
        sums[i * ld + d] += weights[i * kScoreLd + j] * unit_value<E>(units, units_ld, j, d);
    }
}

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_TILE_H
