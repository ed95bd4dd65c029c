// Gradients of a bias and of a relative bias. A cell of either collects dS from every (sequence, head, query,
// key) it was broadcast to; one unit owns a set of cells and visits its sources in a fixed order, recomputing
// dS.
#ifndef FASTATTN_CPU_BIAS_PASSES_H
#define FASTATTN_CPU_BIAS_PASSES_H

#include "backward.h"

namespace fastattn::FASTATTN_ISA_NS {

struct Span64 {
  int64_t begin, end;
};
// The indices that a broadcast axis (stride 0) sums over: all of them; else the one itself.
FASTATTN_ALWAYS Span64 sources(int64_t stride, int64_t index, int64_t size) {
  return stride == 0 ? Span64{0, size} : Span64{index, index + 1};
}

template <class T, class E>
struct BiasPass : Backward<T, E> {
  typedef Backward<T, E> Base;
  using Base::io;
  using Base::p;
  float *sums, *row_totals;

  explicit BiasPass(const Work& work) : Base(work, true, false, false, true, 1) {}

  void lay_out(Arena& arena) {
    Base::lay_out(arena);
    sums = arena.take<float>(kQueryTile * kScoreLd);
    row_totals = arena.take<float>(kQueryTile);
  }

  // entry: sequence index (of the bias) and one query tile of it, or all where the bias has no query axis;
  // head: of the bias.
  void run(const Entry& entry, int64_t head, const Entry*, int64_t) {
    const fastattn_bias& d = io.dbias;
    const int64_t i0 = entry.begin * kQueryTile;
    const int64_t rows_left = p.seqlen_q - i0;
    const int rows = d.stride_q == 0 ? 1 : (int)(rows_left < kQueryTile ? rows_left : kQueryTile);
    float* target = (float*)d.data + entry.b * d.stride_b + head * d.stride_h + i0 * d.stride_q;
    for (int i = 0; i < rows; ++i) row_totals[i] = 0.0f;
    for (int64_t j = 0; j < p.seqlen_k; j += kKeyTile) {
      __builtin_memset(sums, 0, (size_t)(kQueryTile * kScoreLd) * sizeof(float));
      const Span64 sequences = sources(d.stride_b, entry.b, p.batch),
                   heads = sources(d.stride_h, head, p.num_heads);
      for (int64_t b = sequences.begin; b < sequences.end; ++b)
        for (int64_t h = heads.begin; h < heads.end; ++h)
          for (int64_t t = entry.begin; t < entry.end; ++t) add_tile(b, h, t * kQueryTile, j);
      const int columns = (int)(p.seqlen_k - j < kKeyTile ? p.seqlen_k - j : kKeyTile);
      for (int i = 0; i < rows; ++i)
        for (int c = 0; c < columns; ++c) {
          const float x = sums[i * kScoreLd + c];
          if (d.stride_k == 0)
            row_totals[i] += x;
          else
            target[i * d.stride_q + (j + c) * d.stride_k] = x;
        }
    }
    if (d.stride_k == 0)
      for (int i = 0; i < rows; ++i) target[i * d.stride_q] = row_totals[i];
  }

 private:
  void add_tile(int64_t b, int64_t h, int64_t i0, int64_t j) {
    const Sequence s = sequence_of(p, b);
    if (i0 >= s.nq || j >= s.nk) return;
    const int64_t kv_head = h / (p.num_heads / p.num_kv_heads);
    const QueryTile tile = {h, i0, (int)(s.nq - i0 < kQueryTile ? s.nq - i0 : kQueryTile)};
    KeyTile keys;
    if (!this->load_keys(s, b, kv_head, j, j + kKeyTile < s.nk ? j + kKeyTile : s.nk, false, keys)) return;
    TileRows rows;
    if (!rows.set(visibility_of(p, s), i0, tile.rows, keys)) return;
    this->load_queries(s, b, tile, *this->queries);
    Stream stream;
    this->weights_and_gradients(s, b, *this->queries, rows, keys, stream);
    const int shift = (int)(keys.begin - j);
    for (int i = 0; i < tile.rows; ++i) {
      float* to = sums + (io.dbias.stride_q == 0 ? 0 : i * kScoreLd) + shift;
      const float* from = this->dscores + i * kScoreLd;
      for (int c = 0; c < keys.count; ++c) to[c] += from[c];
    }
  }
};

template <class T, class E>
struct RelativePass : Backward<T, E> {
  typedef Backward<T, E> Base;
  using Base::io;
  using Base::p;

  float* const partials;

  explicit RelativePass(const Work& work)
      : Base(work, true, false, false, true, 1), partials(work.partials) {}

  // All diagonals of one head over sequences [entry.begin, entry.end): in place, or in a slot of their own.
  void run(const Entry& entry, int64_t h, const Entry*, int64_t) {
    const int64_t count = p.seqlen_q + p.seqlen_k - 1;
    float* diagonals = partials == nullptr ? io.drelative_bias + h * io.drelative_bias_stride_h
                                           : partials + (entry.slot * p.num_heads + h) * count;
    __builtin_memset(diagonals, 0, (size_t)count * sizeof(float));
    const int64_t kv_head = h / (p.num_heads / p.num_kv_heads);
    for (int64_t b = entry.begin; b < entry.end; ++b) {
      const Sequence s = sequence_of(p, b);
      const Visibility visible = visibility_of(p, s);
      for (int64_t j = 0; j < s.nk; j += kKeyTile) {
        KeyTile keys;
        if (!this->load_keys(s, b, kv_head, j, j + kKeyTile < s.nk ? j + kKeyTile : s.nk, false, keys))
          continue;
        for (int64_t i0 = 0; i0 < s.nq; i0 += kQueryTile) {
          const QueryTile tile = {h, i0, (int)(s.nq - i0 < kQueryTile ? s.nq - i0 : kQueryTile)};
          TileRows rows;
          if (!rows.set(visible, i0, tile.rows, keys)) continue;
          this->load_queries(s, b, tile, *this->queries);
          Stream stream;
          this->weights_and_gradients(s, b, *this->queries, rows, keys, stream);
          add_diagonals(this->dscores, rows, diagonals + keys.begin - i0 + p.seqlen_q - 1);
        }
      }
    }
  }
};

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_BIAS_PASSES_H
