// Online softmax of a tile (Milakov and Gimelshein 2018; Dao 2022): weights against the running
// maximum, running sums, and a rescaling of what was summed so far only for rows whose maximum has moved.
#ifndef FASTATTN_CPU_SOFTMAX_H
#define FASTATTN_CPU_SOFTMAX_H

#include "tile.h"

namespace fastattn::FASTATTN_ISA_NS {

// row * scale - offset is one fused operation, exact but for its result. Beyond this size the offset's own
// rounding weighs more than that is worth, up to driving every weight of a row to 0: then products are
// rounded first, so that the largest meets an equal offset.
constexpr float kLargeScore = 1024.0f;

FASTATTN_ALWAYS bool is_large(float x) { return x > kLargeScore || x < -kLargeScore; }

FASTATTN_ALWAYS void round_products(float* row, int begin, int end, float scale) {
  for (int j = begin; j < end; j += W) store(row + j, load(row + j) * scale);
}

FASTATTN_ALWAYS bool has_nan(const float* row, int begin, int end) {
  vf sum = {};
  for (int j = begin; j < end; j += W) {
    const vf x = load(row + j);
    sum += x == x ? vf{} : x;
  }
  return hsum(sum) != 0.0f;  // NaN, if anything
}

struct RowState {
  float peak[kQueryTile];  // of the scores so far; -inf: nothing seen
  float sum[kQueryTile];   // of exp(score - peak)

  void reset(int rows) {
    for (int i = 0; i < rows; ++i) peak[i] = -kInf, sum[i] = 0.0f;
  }
};

// Scores row[begin..end) (whole vectors, hidden ones at -inf) times `scale` become weights; true if earlier
// sums of this row have to be multiplied with *rescale.
FASTATTN_ALWAYS bool softmax_row(float* row, int begin, int end, float scale, float& peak, float& sum,
                                 float* rescale) {
  vf top0 = splat(-kInf), top1 = top0;
  int j = begin;
  for (; j + 2 * W <= end; j += 2 * W) {
    top0 = vmax(top0, load(row + j));
    top1 = vmax(top1, load(row + j + W));
  }
  if (j < end) top0 = vmax(top0, load(row + j));
  const float tile_peak = hmax(vmax(top0, top1)) * scale;
  // The maximum may have lost a NaN, but the sum below will not.
  if (tile_peak == -kInf && !has_nan(row, begin, end)) {
    for (j = begin; j < end; j += W) store(row + j, vf{});
    return false;
  }
  const float old_peak = peak, new_peak = tile_peak > old_peak ? tile_peak : old_peak;
  const bool moved = new_peak > old_peak && old_peak > -kInf;
  *rescale = moved ? exp_nonpositive(splat(old_peak - new_peak))[0] : 1.0f;
  // Nothing but NaN in the row so far: any finite offset keeps it NaN.
  const float offset = new_peak == -kInf ? 0.0f : new_peak;

  if (is_large(tile_peak)) {
    round_products(row, begin, end, scale);
    scale = 1.0f;
  }
  vf sum0 = {}, sum1 = {};
  j = begin;
  for (; j + 2 * W <= end; j += 2 * W) {
    const vf p0 = exp_nonpositive(load(row + j) * scale - offset);
    const vf p1 = exp_nonpositive(load(row + j + W) * scale - offset);
    store(row + j, p0);
    store(row + j + W, p1);
    sum0 += p0;
    sum1 += p1;
  }
  if (j < end) {
    const vf p0 = exp_nonpositive(load(row + j) * scale - offset);
    store(row + j, p0);
    sum0 += p0;
  }
  peak = new_peak;
  sum = sum * *rescale + hsum(sum0 + sum1);
  return moved;
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
