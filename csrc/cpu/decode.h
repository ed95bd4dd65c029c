// Few queries against many keys, as when a model generates: the time goes into reading K and V once, so
// nothing is packed, dot products run along the rows where they lie, and the keys are split over units whose
// partial sums a second pass joins by their maxima, in order.
#ifndef FASTATTN_CPU_DECODE_H
#define FASTATTN_CPU_DECODE_H

#include "dropout.h"
#include "math.h"
#include "unit.h"

namespace fastattn::FASTATTN_ISA_NS {

// Rows [i0, i0 + rows) of a head as the fp32 rows that thin_scores takes.
template <class T>
inline void load_thin_queries(const fastattn_problem& p, const Sequence& s, int64_t b, int64_t head,
                              int64_t i0, int rows, float* queries, int64_t ld) {
  const typename T::Storage* q = row_of<const typename T::Storage>(p, p.q, b, head, s.q0 + i0);
  for (int i = 0; i < rows; ++i)
    load_row<T>(q + i * p.q.stride_n, p.head_dim, queries + i * ld, round_up(p.head_dim, W));
}

// scores[i][j] = q_i . k_j for fp32 rows of q; W keys at a time, whose sums a transposition joins.
template <class T>
inline void thin_scores(const float* q, int64_t q_ld, int rows, const typename T::Storage* k, int64_t stride,
                        int count, int64_t n, float* scores) {
  const int64_t whole = n / W * W;
  for (int j = 0; j < count; j += W) {
    const typename T::Storage* key[W];
    for (int l = 0; l < W; ++l) key[l] = k + (j + l < count ? j + l : count - 1) * stride;
    for (int i = 0; i < rows; ++i) {
      const float* row = q + i * q_ld;
      vf x[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) x[l] = vf{};
      for (int64_t d = 0; d < whole; d += W) {
        const vf a = load(row + d);
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) x[l] += a * T::load(key[l] + d);
      }
      if (whole < n)
        for (int l = 0; l < W; ++l) x[l] += load(row + whole) * load_tail<T>(key[l] + whole, n - whole);
      butterfly<W / 2>(x);
      vf sum = x[0];
#pragma GCC unroll 16
      for (int l = 1; l < W; ++l) sum += x[l];
      store(scores + i * kScoreLd + j, sum);
    }
  }
}

template <class T, int kVectors>
FASTATTN_ALWAYS void thin_columns(const float* weights, const typename T::Storage* v, int64_t stride,
                                  int begin, int end, const int32_t* keep, float* sums) {
  vf sum[kVectors];
#pragma GCC unroll 8
  for (int c = 0; c < kVectors; ++c) sum[c] = load(sums + c * W);
  for (int j = begin; j < end; ++j) {
    if (keep != nullptr && keep[j] == 0) continue;
    const vf w = splat(weights[j]);
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) sum[c] += w * T::load(v + j * stride + c * W);
  }
#pragma GCC unroll 8
  for (int c = 0; c < kVectors; ++c) store(sums + c * W, sum[c]);
}

// sums[i] += sum_j weights[i][j] v_j over the keys that row i sees.
template <class T>
inline void thin_values(const TileRows& rows, const KeyTile& keys, const float* weights,
                        const typename T::Storage* v, int64_t stride, int64_t n, float* sums, int64_t ld) {
  const int32_t* keep = keys.holes ? keys.keep : nullptr;
  for (int i = 0; i < rows.rows; ++i) {
    const float* w = weights + i * kScoreLd;
    float* out = sums + i * ld;
    int64_t d = 0;
    for (; d + 8 * W <= n; d += 8 * W)
      thin_columns<T, 8>(w, v + d, stride, rows.begin[i], rows.end[i], keep, out + d);
    for (; d + W <= n; d += W)
      thin_columns<T, 1>(w, v + d, stride, rows.begin[i], rows.end[i], keep, out + d);
    if (d == n) continue;
    vf sum = load(out + d);
    for (int j = rows.begin[i]; j < rows.end[i]; ++j)
      if (keep == nullptr || keep[j] != 0) sum += load_tail<T>(v + j * stride + d, n - d) * w[j];
    store(out + d, sum);
  }
}

// ---- partial results ------------------------------------------------------------------------

// One row of a slot: its maximum, its sum, and head_dim_v unnormalised outputs, in whole vectors.
FASTATTN_ALWAYS int64_t partial_ld(const fastattn_problem& p) { return round_up(p.head_dim_v, 16) + 16; }
FASTATTN_ALWAYS float* partial_row(const fastattn_problem& p, float* partials, int64_t slot, int64_t kv_head,
                                   int64_t row) {
  return partials + ((slot * p.num_kv_heads + kv_head) * kQueryTile + row) * partial_ld(p);
}

template <class T, class E>
struct MergePass {
  const Work& work;
  float* sums;
  explicit MergePass(const Work& w) : work(w) {}
  void lay_out(Arena& arena) { sums = arena.take<float>(partial_ld(*work.problem)); }

  void run(const Entry& entry, int64_t kv_head, const Entry*, int64_t) {
    const fastattn_problem& p = *work.problem;
    const fastattn_forward_result& result = *work.forward;
    const Dropout dropout(p);
    const Sequence s = sequence_of(p, entry.b);
    int64_t row = 0;
    for (int64_t t = entry.begin; t < entry.end; ++t) {
      const QueryTile tile = query_tile_of(p, s, kv_head, t);
      typename T::Storage* out =
          row_of<typename T::Storage>(p, result.out, entry.b, tile.head, s.q0 + tile.i0);
      for (int i = 0; i < tile.rows; ++i, ++row, out += result.out.stride_n) {
        float peak, total;
        join(p, entry, kv_head, row, &peak, &total);
        store_row<T>(sums, total == 0.0f ? 0.0f : dropout.scale / total, p.head_dim_v, out);
        if (result.lse == nullptr) continue;
        float* lse = scalar_of(p, result.lse, result.lse_stride_b, result.lse_stride_h, entry.b, tile.head,
                               s.q0 + tile.i0 + i);
        *lse = total == 0.0f ? -kInf : peak + log_positive(splat(total))[0];
      }
    }
  }

 private:
  void join(const fastattn_problem& p, const Entry& entry, int64_t kv_head, int64_t row, float* peak,
            float* total) {
    *peak = -kInf, *total = 0.0f;
    for (int64_t part = 0; part < entry.splits; ++part) {
      const float* from = partial_row(p, work.partials, entry.slot + part, kv_head, row);
      if (from[1] != 0.0f && from[0] > *peak) *peak = from[0];
    }
    for (int64_t d = 0; d < p.head_dim_v; d += W) store(sums + d, vf{});
    for (int64_t part = 0; part < entry.splits; ++part) {
      const float* from = partial_row(p, work.partials, entry.slot + part, kv_head, row);
      if (from[1] == 0.0f) continue;
      const float factor = *peak == -kInf ? 1.0f : exp_nonpositive(splat(from[0] - *peak))[0];
      *total += from[1] * factor;
      for (int64_t d = 0; d < p.head_dim_v; d += W)
        store(sums + d, load(sums + d) + load(from + 16 + d) * factor);
    }
  }
};

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_DECODE_H
