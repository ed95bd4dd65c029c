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

// The largest of scores row[begin..end) (whole vectors) by lanes.
FASTATTN_ALWAYS vf row_maxima(const float* row, int begin, int end) {
  vf top0 = splat(-kInf), top1 = top0;
  int j = begin;
  for (; j + 2 * W <= end; j += 2 * W) {
    top0 = vmax(top0, load(row + j));
    top1 = vmax(top1, load(row + j + W));
  }
  if (j < end) top0 = vmax(top0, load(row + j));
  return vmax(top0, top1);
}

// Of W rows: what their scores are multiplied with and what is subtracted then, and the factor that brings
// earlier sums to the new maxima.
struct RowFactors {
  float scale[W], offset[W], rescale[W];
  bool any_large;  // some rows have scale 1 because their products are to be rounded first
};

// Takes the maxima of W rows, before their multiplication with `scale`, into `peak`.
FASTATTN_ALWAYS void move_peaks(vf (&maxima)[W], float scale, float* peak, RowFactors& factors) {
  // A maximum may have lost a NaN, but the sum of weights will not.
  const vf tile_peak = reduce_each(maxima, [](vf a, vf b) { return a > b ? a : b; }) * scale;
  const vf old_peak = load(peak), new_peak = tile_peak > old_peak ? tile_peak : old_peak;
  const vi moved = (new_peak > old_peak) & (old_peak > -kInf);
  const vi large = (tile_peak > kLargeScore) | ((tile_peak < -kLargeScore) & (tile_peak > -kInf));
  factors.any_large = any(large);
  store(factors.scale, large ? splat(1.0f) : splat(scale));
  store(factors.rescale, moved ? exp_nonpositive(old_peak - new_peak) : splat(1.0f));
  // Nothing but hidden scores and NaN so far: any finite offset makes 0 of the former and keeps the latter.
  store(factors.offset, new_peak == -kInf ? vf{} : new_peak);
  store(peak, new_peak);
}

// Calls take(column, weights) for each vector of row[begin..end); the sums of the weights by lanes.
template <class Take>
FASTATTN_ALWAYS vf exponentials(const float* row, int begin, int end, float scale, float offset, Take take) {
  vf sum0 = {}, sum1 = {};
  int j = begin;
  for (; j + 2 * W <= end; j += 2 * W) {
    const vf p0 = exp_nonpositive(load(row + j) * scale - offset);
    const vf p1 = exp_nonpositive(load(row + j + W) * scale - offset);
    take(j, p0);
    take(j + W, p1);
    sum0 += p0;
    sum1 += p1;
  }
  if (j < end) {
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
