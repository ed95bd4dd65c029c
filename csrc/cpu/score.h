// Terms of a score beyond scale * q k^T: soft capping, bias, relative bias and ALiBi, added to a row of a
// tile.
#ifndef FASTATTN_CPU_SCORE_H
#define FASTATTN_CPU_SCORE_H

#include "tile.h"

namespace fastattn::FASTATTN_ISA_NS {

// `n` bias values of one row to fp32, whatever their dtype and stride.
template <class T>
inline void load_bias_row(const typename T::Storage* source, int64_t stride, int n, float* row) {
  if (stride == 1) return load_row<T>(source, n, row, 0);
  for (int j = 0; j < n; ++j) row[j] = load_tail<T>(source + j * stride, 1)[0];
}

inline void load_bias_row(const fastattn_problem& p, int64_t b, int64_t h, int64_t i, int64_t j, int n,
                          float* row) {
  const fastattn_bias& bias = p.bias;
  const int64_t offset = b * bias.stride_b + h * bias.stride_h + i * bias.stride_q + j * bias.stride_k;
  if (p.bias_dtype == FASTATTN_F32)
    return load_bias_row<F32>((const float*)bias.data + offset, bias.stride_k, n, row);
  const uint16_t* source = (const uint16_t*)bias.data + offset;
  if (p.bias_dtype == FASTATTN_F16) return load_bias_row<F16>(source, bias.stride_k, n, row);
  load_bias_row<BF16>(source, bias.stride_k, n, row);
}

// Turns products q k^T of query i and keys [j, j + n) into whole scores. Where `slope` is
// given it receives the derivative of the soft cap, 1 - tanh^2. Rows are whole vectors long.
inline void finish_scores(const fastattn_problem& p, const Sequence& s, int64_t b, int64_t h, int64_t i,
                          int64_t j, int n, float* row, float* slope) {
  const bool capped = p.softcap > 0.0f;
  const float to_cap = capped ? p.softmax_scale / p.softcap : p.softmax_scale;
  float terms[kKeyTile];
  const bool has_bias = p.bias.data != nullptr;
  if (has_bias) load_bias_row(p, b, h, i, j, n, terms);
  const float* relative = p.relative_bias == nullptr
                              ? nullptr
                              : p.relative_bias + h * p.relative_bias_stride_h + j - i + p.seqlen_q - 1;
  const float alibi =
      p.alibi_slopes == nullptr ? 0.0f : p.alibi_slopes[b * p.alibi_stride_b + h * p.alibi_stride_h];
  const vf distance = splat((float)(j - i - (s.nk - s.nq))) + __builtin_convertvector(lane_index(), vf);
  for (int c = 0; c < n; c += W) {
    vf x = load(row + c) * to_cap;
    if (capped) {
      const vf t = tanh(x);
      x = t * p.softcap;
      if (slope != nullptr) store(slope + c, 1.0f - t * t);
    }
    const bool whole = c + W <= n;
    if (has_bias) x += whole ? load(terms + c) : load_tail<F32>(terms + c, n - c);
    if (relative != nullptr) x += whole ? load(relative + c) : load_tail<F32>(relative + c, n - c);
    if (p.alibi_slopes != nullptr) {
      const vf d = distance + (float)c;
      x -= as_float(as_int(d) & 0x7FFFFFFF) * alibi;
    }
    store(row + c, x);
  }
}

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_SCORE_H
