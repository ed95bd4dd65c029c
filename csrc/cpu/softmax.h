// Online softmax of a tile (Milakov and Gimelshein 2018; Dao 2022): weights against the running maximum,
// running sums, and a rescaling of what was summed so far only for rows whose maximum has moved.
#ifndef FASTATTN_CPU_SOFTMAX_H
#define FASTATTN_CPU_SOFTMAX_H

#include "tile.h"
#include "transpose.h"

namespace fastattn::FASTATTN_ISA_NS {

// row * scale - offset is one fused operation, exact but for its result. Beyond this size the offset's own
// rounding weighs more than that is worth, up to driving every weight of a row to 0: then products are
// rounded first, so that the largest meets an equal offset.
constexpr float kLargeScore = 1024.0f;

FASTATTN_ALWAYS bool is_large(float x) { return x > kLargeScore || x < -kLargeScore; }

FASTATTN_ALWAYS void round_products(float* row, int begin, int end, float scale) {
  for (int j = begin; j < end; j += W) store(row + j, load(row + j) * scale);
}

struct RowState {
  float peak[kQueryTile];  // of the scores so far; -inf: nothing seen
  float sum[kQueryTile];   // of exp(score - peak)

  void reset() {
    for (int i = 0; i < kQueryTile; ++i) peak[i] = -kInf, sum[i] = 0.0f;
  }
};

// Up to W rows of a score tile. Their maxima and sums are reduced together, which takes a third of the
// instructions and waits for their latency once.
struct RowGroup {
  float* scores;
  int count;
  int first[W], last[W];  // the whole vectors of a row that hold what it sees, the rest of them -inf

  float* row(int i) const { return scores + i * kScoreLd; }
};

// Of each row: what its scores are multiplied with and what is subtracted then, and the factor that brings
// earlier sums to the new maximum.
struct RowFactors {
  float scale[W], offset[W], rescale[W];
};

// Takes the maxima of these rows, scores times `scale`, into `peak`.
inline void move_peaks(const RowGroup& rows, float scale, float* peak, RowFactors& factors) {
  vf tops[W];
  for (int i = 0; i < W; ++i) {
    vf top0 = splat(-kInf), top1 = top0;
    if (i < rows.count) {
      const float* row = rows.row(i);
      int j = rows.first[i];
      for (; j + 2 * W <= rows.last[i]; j += 2 * W) {
        top0 = vmax(top0, load(row + j));
        top1 = vmax(top1, load(row + j + W));
      }
      if (j < rows.last[i]) top0 = vmax(top0, load(row + j));
    }
    tops[i] = vmax(top0, top1);
  }
  // A maximum may have lost a NaN, but the sums of weights will not.
  const vf tile_peak = reduce_each(tops, [](vf a, vf b) { return a > b ? a : b; }) * scale;
  const vf old_peak = load(peak), new_peak = tile_peak > old_peak ? tile_peak : old_peak;
  const vi moved = (new_peak > old_peak) & (old_peak > -kInf);
  store(factors.rescale, moved ? exp_nonpositive(old_peak - new_peak) : splat(1.0f));
  // Nothing but hidden scores or NaN so far: any finite offset keeps them 0 and NaN.
  store(factors.offset, new_peak == -kInf ? vf{} : new_peak);
  store(peak, new_peak);

  const vi large = (tile_peak > kLargeScore) | ((tile_peak < -kLargeScore) & (tile_peak > -kInf));
  store(factors.scale, large ? splat(1.0f) : splat(scale));
  if (any(large))
    for (int i = 0; i < rows.count; ++i)
      if (factors.scale[i] != scale) round_products(rows.row(i), rows.first[i], rows.last[i], scale);
}

// Calls take(column, weights) for the vectors of row i; the sum of the weights by lanes.
template <class Take>
FASTATTN_ALWAYS vf weigh_row(const RowGroup& rows, int i, const RowFactors& factors, Take take) {
  const float* row = rows.row(i);
  const float scale = factors.scale[i], offset = factors.offset[i];
  vf sum0 = {}, sum1 = {};
  int j = rows.first[i];
  for (; j + 2 * W <= rows.last[i]; j += 2 * W) {
    const vf p0 = exp_nonpositive(load(row + j) * scale - offset);
    const vf p1 = exp_nonpositive(load(row + j + W) * scale - offset);
    take(j, p0);
    take(j + W, p1);
    sum0 += p0;
    sum1 += p1;
  }
  if (j < rows.last[i]) {
    const vf p0 = exp_nonpositive(load(row + j) * scale - offset);
    take(j, p0);
    sum0 += p0;
  }
  return sum0 + sum1;
}

// lse of rows in natural units; -inf where nothing was seen. Writes n values, reads whole vectors.
inline void log_sum_exp(const float* peak, const float* sum, int n, float* lse) {
  for (int i = 0; i < n; i += W) {
    const int left = n - i;
    const vf m = left >= W ? load(peak + i) : load_tail<F32>(peak + i, left);
    const vf l = left >= W ? load(sum + i) : load_tail<F32>(sum + i, left);
    const vf value = l == 0.0f ? splat(-kInf) : m + log_positive(l);
    if (left >= W) {
      store(lse + i, value);
    } else {
      store_tail<F32>(lse + i, value, left);
    }
  }
}

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_SOFTMAX_H
