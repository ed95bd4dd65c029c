// Backward of one score tile, and the passes built on it. For query i and key j, with the forward's lse and
// delta_i = out_i . dout_i - dlse_i:
//
//   P = exp(S - lse)     dP = dO V^T     dS = scale * slope * P (keep dP - delta)
//   dV += (keep P)^T dO     dK += dS^T Q     dQ += dS K
//
// P is recomputed once per tile and every product that was asked for is taken from it. Products nobody asked
// for are not formed. S is summed in forward's order: where the two differ, so do P and the weights of
// forward, by the rounding of S itself.
#ifndef FASTATTN_CPU_BACKWARD_H
#define FASTATTN_CPU_BACKWARD_H

#include "decode.h"
#include "dropout.h"
#include "phases.h"
#include "score.h"
#include "softmax.h"
#include "unit.h"

namespace fastattn::FASTATTN_ISA_NS {

// The gradient of a relative bias: dS summed along diagonals. `corner` is the sum that the tile's first row
// and column belong to.
inline void add_diagonals(const float* dscores, const TileRows& rows, float* corner) {
  for (int i = 0; i < rows.rows; ++i) {
    float* to = corner - i;
    const float* from = dscores + i * kScoreLd;
    int c = rows.begin[i];
    for (; c + W <= rows.end[i]; c += W) store(to + c, load(to + c) + load(from + c));
    for (; c < rows.end[i]; ++c) to[c] += from[c];
  }
}

template <class T, class E>
struct Backward {
  typedef typename T::Storage Storage;
  typedef typename E::Unit Unit;
  static constexpr bool kPairs = E::kPerUnit == 2;

  const fastattn_problem& p;
  const fastattn_backward_io& io;
  const Dropout dropout;
  const bool has_terms;
  const bool want_ds;  // dP and dS are needed, for dq, dk or a bias
  const bool want_dk, want_dv;
  const float ds_scale;    // dq and dk take dS times softmax_scale and the slope of the soft cap;
  const bool want_slopes;  // a bias, which is added after both, takes it as it is
  const int slots;         // query tiles held at a time
  const int64_t depth, depth_v, depth_ld, depth_v_ld;  // head dims in units
  const int64_t columns_ld, columns_v_ld;              // head dims in elements, of sums
  const int64_t rows_ld, rows_v_ld;                    // and of operands with K = rows

  static constexpr bool kSameUnits = SameType<Storage, Unit>::value;

  // What a query tile brings: operands A (K = head_dim) and B (K = queries), for fp32 the same rows.
  struct Queries {
    QueryTile tile;
    const Unit *q, *dout, *q_rows, *dout_rows;
    int64_t q_ld, dout_ld, q_rows_ld, dout_rows_ld;
    Unit* buffers[4];
    float lse[kQueryTile], delta[kQueryTile];
  };
  Queries* queries;
  const Unit* key_rows;  // B operand, K = keys
  int64_t key_rows_ld;
  Unit *key_buffer, *staging, *key_panels, *value_panels, *weights, *ds_by_rows, *ds_by_columns;
  const Storage* thin_keys;  // where the keys of a thin sequence lie
  float *scores, *dscores, *slopes, *thin_queries;

  Backward(const Work& work, bool ds, bool dk, bool dv, bool for_bias, int query_slots)
      : p(*work.problem),
        io(*work.backward),
        dropout(p),
        has_terms(has_score_terms(p)),
        want_ds(ds),
        want_dk(dk),
        want_dv(dv),
        ds_scale(for_bias ? 1.0f : p.softmax_scale),
        want_slopes(ds && !for_bias && p.softcap > 0.0f),
        slots(query_slots),
        depth(ceil_div(p.head_dim, E::kPerUnit)),
        depth_v(ceil_div(p.head_dim_v, E::kPerUnit)),
        depth_ld(E::kParts * operand_ld(depth)),
        depth_v_ld(E::kParts * operand_ld(depth_v)),
        columns_ld(operand_ld(p.head_dim)),
        columns_v_ld(operand_ld(p.head_dim_v)),
        rows_ld(E::kParts * columns_ld),
        rows_v_ld(E::kParts * columns_v_ld) {}

  void lay_out(Arena& arena) {
    queries = arena.take<Queries>(slots);
    const bool real = queries != nullptr;
    for (int t = 0; t < slots; ++t) {
      Unit* buffers[4] = {arena.take<Unit>(kQueryTile * depth_ld), arena.take<Unit>(kQueryTile * depth_v_ld),
                          arena.take<Unit>(kPairs ? kQueryTile / 2 * rows_ld : 0),
                          arena.take<Unit>(kPairs ? kQueryTile / 2 * rows_v_ld : 0)};
      if (real) __builtin_memcpy(queries[t].buffers, buffers, sizeof buffers);
    }
    const int64_t panels = (kKeyTile + kNR) / kNR;
    key_buffer = arena.take<Unit>(kKeyTile / E::kPerUnit * rows_ld);
    staging = arena.take<Unit>(kPairs ? kKeyTile * (depth_ld > depth_v_ld ? depth_ld : depth_v_ld) : 0);
    key_panels = arena.take<Unit>(panels * depth * kPanelLd<E>);
    value_panels = arena.take<Unit>(panels * depth_v * kPanelLd<E>);
    weights = arena.take<Unit>(Weights<E>::kColumnsUnits);
    ds_by_rows = arena.take<Unit>(kPairs ? kQueryTile * Weights<E>::kRowsLd : 0);
    ds_by_columns = arena.take<Unit>(Weights<E>::kColumnsUnits);
    scores = arena.take<float>(kQueryTile * kScoreLd);
    dscores = arena.take<float>(kQueryTile * kScoreLd);
    slopes = arena.take<float>(want_slopes ? kKeyTile : 0);
    thin_queries = arena.take<float>(kThinRows * columns_ld);
  }

  // Packs the keys of [begin, end) that anyone may see; false when key_mask hides all of them. `rows`: dQ
  // will be formed, which takes K by rows.
  bool load_keys(const Sequence& s, int64_t b, int64_t kv_head, int64_t begin, int64_t end, bool rows,
                 KeyTile& keys) {
    const Phase phase(kPacking);
    trim_key_tile(mask_of(p, b), begin, end, keys);
    if (keys.count == 0) return false;
    const int32_t* keep = keys.holes ? keys.keep : nullptr;
    const Storage* k = row_of<const Storage>(p, p.k, b, kv_head, s.k0 + keys.begin);
    if (is_thin(p, s))
      thin_keys = k;
    else
      Panels<T, E>::pack(k, p.k.stride_n, keys.count, p.head_dim, keep, key_panels, staging);
    if (rows)
      load_rows(k, p.k.stride_n, keys.count, p.head_dim, keep, key_buffer, rows_ld, &key_rows, &key_rows_ld);
    if (want_ds) {
      const Storage* v = row_of<const Storage>(p, p.v, b, kv_head, s.k0 + keys.begin);
      Panels<T, E>::pack(v, p.v.stride_n, keys.count, p.head_dim_v, keep, value_panels, staging);
    }
    return true;
  }

  // A B operand with K = rows: where it lies, or copied.
  static void load_rows(const Storage* source, int64_t stride, int64_t count, int64_t n, const int32_t* keep,
                        Unit* buffer, int64_t buffer_ld, const Unit** rows, int64_t* ld) {
    if constexpr (kSameUnits)
      if (keep == nullptr && rows_in_place(stride, n, count)) {
        *rows = source, *ld = stride;
        return;
      }
    Packer<T, E>::interleave(source, stride, count, n, keep, buffer, buffer_ld, round_up(n, W));
    *rows = buffer, *ld = buffer_ld;
  }

  void load_queries(const Sequence& s, int64_t b, const QueryTile& tile, Queries& q) {
    const Phase phase(kPacking);
    q.tile = tile;
    const int64_t row0 = s.q0 + tile.i0, h = tile.head;
    const Storage* query = row_of<const Storage>(p, p.q, b, h, row0);
    const Storage* dout = row_of<const Storage>(p, io.dout, b, h, row0);
    if constexpr (kPairs) {
      q.q = q.buffers[0], q.q_ld = depth_ld, q.dout = q.buffers[1], q.dout_ld = depth_v_ld;
      if (units_in_place<T, E>(p.q, p.head_dim))
        q.q = (const Unit*)query, q.q_ld = depth;
      else
        Packer<T, E>::rows(query, p.q.stride_n, tile.rows, p.head_dim, nullptr, q.buffers[0], depth_ld,
                           round_up(depth, W));
      if (units_in_place<T, E>(io.dout, p.head_dim_v))
        q.dout = (const Unit*)dout, q.dout_ld = depth_v;
      else if (want_ds)
        Packer<T, E>::rows(dout, io.dout.stride_n, tile.rows, p.head_dim_v, nullptr, q.buffers[1], depth_v_ld,
                           round_up(depth_v, W));
      if (want_dk)
        load_rows(query, p.q.stride_n, tile.rows, p.head_dim, nullptr, q.buffers[2], rows_ld, &q.q_rows,
                  &q.q_rows_ld);
      if (want_dv)
        load_rows(dout, io.dout.stride_n, tile.rows, p.head_dim_v, nullptr, q.buffers[3], rows_v_ld,
                  &q.dout_rows, &q.dout_rows_ld);
    } else {
      load_rows(query, p.q.stride_n, tile.rows, p.head_dim, nullptr, q.buffers[0], rows_ld, &q.q, &q.q_ld);
      load_rows(dout, io.dout.stride_n, tile.rows, p.head_dim_v, nullptr, q.buffers[1], rows_v_ld, &q.dout,
                &q.dout_ld);
      q.q_rows = q.q, q.q_rows_ld = q.q_ld, q.dout_rows = q.dout, q.dout_rows_ld = q.dout_ld;
    }
    const float* lse = scalar_of(p, io.lse, io.lse_stride_b, io.lse_stride_h, b, h, row0);
    const float* dlse =
        io.dlse == nullptr ? nullptr : scalar_of(p, io.dlse, io.dlse_stride_b, io.dlse_stride_h, b, h, row0);
    const Storage* out = want_ds ? row_of<const Storage>(p, io.out, b, h, row0) : nullptr;
    for (int i0 = 0; i0 < tile.rows; i0 += W) {
      vf dots[W];
      for (int l = 0; l < W; ++l) {
        const int i = i0 + l;
        const bool wanted = want_ds && i < tile.rows && lse[i] != -kInf;
        dots[l] = wanted ? row_dot(out + i * io.out.stride_n, dout + i * io.dout.stride_n) : vf{};
      }
      store(q.delta + i0, reduce_each(dots, [](vf x, vf y) { return x + y; }));
    }
    for (int i = 0; i < tile.rows; ++i) {
      const bool nothing_seen = lse[i] == -kInf;
      q.lse[i] = nothing_seen ? kInf : lse[i];
      if (dlse != nullptr && !nothing_seen) q.delta[i] -= dlse[i];
    }
  }

  // The rows of query tiles from `tile` on, before they are wanted.
  void announce_queries(const Sequence& s, int64_t b, const QueryTile& tile, int64_t rows,
                        Stream& stream) const {
    const int64_t row0 = s.q0 + tile.i0, h = tile.head;
    stream.add(row_of<const Storage>(p, p.q, b, h, row0), p.q.stride_n, rows, p.head_dim);
    stream.add(row_of<const Storage>(p, io.dout, b, h, row0), io.dout.stride_n, rows, p.head_dim_v);
    if (want_ds)
      stream.add(row_of<const Storage>(p, io.out, b, h, row0), io.out.stride_n, rows, p.head_dim_v);
  }

  // The same for query tiles of a unit and its keys from `key_begin` on.
  void announce_unit(const Entry& unit, int64_t kv_head, int64_t first_tile, int64_t tiles, int64_t key_begin,
                     Stream& stream) const {
    const int64_t b = unit.b;
    const Sequence s = sequence_of(p, b);
    if (s.nq == 0 || s.nk == 0) return;
    const QueryTile first = query_tile_of(p, s, kv_head, first_tile);
    announce_queries(s, b, first, rows_from(s, first, tiles), stream);
    const int64_t left = keys_before_padding(mask_of(p, b), s.nk) - key_begin;
    const int64_t count = left < kKeyTile ? left : kKeyTile, row0 = s.k0 + key_begin;
    stream.add(row_of<const Storage>(p, p.k, b, kv_head, row0), p.k.stride_n, count, p.head_dim);
    stream.add(row_of<const Storage>(p, p.v, b, kv_head, row0), p.v.stride_n, count, p.head_dim_v);
  }

  // out . dout of a row, by lanes.
  vf row_dot(const Storage* a, const Storage* b) const {
    vf sum = {};
    int64_t d = 0;
    for (; d + W <= p.head_dim_v; d += W) sum += T::load(a + d) * T::load(b + d);
    if (d < p.head_dim_v)
      sum += load_tail<T>(a + d, p.head_dim_v - d) * load_tail<T>(b + d, p.head_dim_v - d);
    return sum;
  }

  // scores = q k^T of a tile.
  void multiply_scores(const Sequence& s, int64_t b, const Queries& q, const TileRows& rows,
                       const KeyTile& keys) {
    const Phase phase(kScores);
    if (is_thin(p, s)) {
      load_thin_queries<T>(p, s, b, q.tile.head, q.tile.i0, rows.rows, thin_queries, columns_ld);
      thin_scores<T>(thin_queries, columns_ld, rows.rows, thin_keys, p.k.stride_n, keys.count, p.head_dim,
                     scores);
      return;
    }
    gemm<E, false>(
        keys.padded, q.q, q.q_ld, key_panels, depth * kPanelLd<E>, kPanelLd<E>, scores, kScoreLd, false,
        [&](int c0, int c1) { return rows.rows_of(c0, c1); },
        [&](int i0, int i1) { return rows.columns_of(i0, i1); },
        [&](int, int) { return Range{0, (int)depth}; });
  }

  // dscores = dout v^T of a tile.
  void multiply_dout(const Queries& q, const TileRows& rows, const KeyTile& keys) {
    const Phase phase(kWeightGrads);
    gemm<E, false>(
        keys.padded, q.dout, q.dout_ld, value_panels, depth_v * kPanelLd<E>, kPanelLd<E>, dscores, kScoreLd,
        false, [&](int c0, int c1) { return rows.rows_of(c0, c1); },
        [&](int i0, int i1) { return rows.columns_of(i0, i1); },
        [&](int, int) { return Range{0, (int)depth_v}; });
  }

  // scores = keep P and, where wanted, dscores = dS; both zero where nothing is visible.
  void weights_and_gradients(const Sequence& s, int64_t b, const Queries& q, const TileRows& rows,
                             const KeyTile& keys, Stream& stream) {
    multiply_scores(s, b, q, rows, keys);
    if (want_ds) multiply_dout(q, rows, keys);
    const Phase phase(kRows);
    const float scale = has_terms ? 1.0f : p.softmax_scale;
    int32_t keep[kKeyTile + kDropoutLanes];
    for (int i = 0; i < rows.rows; ++i) {
      stream.step();
      float *row = scores + i * kScoreLd, *drow = dscores + i * kScoreLd;
      const int begin = rows.begin[i], end = rows.end[i];
      if (begin >= end) {
        zero_outside(row, 0, 0, keys.padded);
        if (want_ds) zero_outside(drow, 0, 0, keys.padded);
        continue;
      }
      const int first = begin / W * W, last = (int)round_up(end, W);
      if (has_terms)
        finish_scores(p, s, b, q.tile.head, q.tile.i0 + i, keys.begin + first, end - first, row + first,
                      want_slopes ? slopes + first : nullptr);
      mask_row(row, begin, end, keys, -kInf);
      if (dropout.active) dropout.row(b, q.tile.head, q.tile.i0 + i, keys.begin, end, keep);
      const auto finish = want_ds ? (want_dv ? (dropout.active ? &Backward::finish_row<true, true, true>
                                                               : &Backward::finish_row<true, true, false>)
                                             : (dropout.active ? &Backward::finish_row<true, false, true>
                                                               : &Backward::finish_row<true, false, false>))
                                  : (dropout.active ? &Backward::finish_row<false, true, true>
                                                    : &Backward::finish_row<false, true, false>);
      const bool large = is_large(q.lse[i]);
      if (large) round_products(row, first, last, scale);
      (this->*finish)(row, drow, first, last, large ? 1.0f : scale, q.lse[i], q.delta[i], keep);
      // exp(-inf - NaN) is NaN: a spoilt row would reach the dv of neighbours of the keys it sees.
      if (want_dv && q.lse[i] != q.lse[i]) mask_row(row, begin, end, keys, 0.0f);
      if (want_ds) {
        mask_row(drow, begin, end, keys, 0.0f);
        zero_outside(drow, begin, end, keys.padded);
      }
      if (want_dv) zero_outside(row, begin, end, keys.padded);
    }
  }

  // One row of scores and of dP to keep P and dS, each only if it is wanted.
  template <bool kDs, bool kDv, bool kDropout>
  void finish_row(float* row, float* drow, int first, int last, float scale, float offset, float delta,
                  const int32_t* keep) const {
    const bool sloped = want_slopes;
    const float p_scale = ds_scale, kept_scale = dropout.scale;
    for (int c = first; c < last; c += W) {
      const vf weight = exp_nonpositive(load(row + c) * scale - offset);
      if constexpr (kDs) {
        vf dp = load(drow + c);
        if constexpr (kDropout) dp = as_float(as_int(dp * kept_scale) & load_as<vi>(keep + c));
        vf ds = weight * p_scale * (dp - delta);
        if (sloped) ds = ds * load(slopes + c);
        store(drow + c, ds);
      }
      if constexpr (kDv) store(row + c, kDropout ? as_float(as_int(weight) & load_as<vi>(keep + c)) : weight);
    }
  }

  // sums[key] (+)= weights^T rows of the queries: dv from P and dout, dk from dS and q.
  void add_to_keys(const TileRows& rows, const KeyTile& keys, const float* tile, Unit* buffer, const Unit* b,
                   int64_t b_ld, int64_t columns, bool accumulate, float* sums, int64_t ld) {
    const Phase phase(kToKeys);
    const int last = rows.last_column(keys, 2 * W);
    const Unit* a = Weights<E>::by_columns(tile, kScoreLd, rows.rows, last, buffer);
    const int padded = (int)round_up(columns, W);
    gemm<E, Weights<E>::kByColumns>(
        padded, a, Weights<E>::kColumnsLd, b, kNR, b_ld, sums, ld, accumulate,
        [&](int, int) { return Range{0, keys.count}; }, [&](int, int) { return Range{0, padded}; },
        [&](int j0, int j1) { return to_units<E>(rows.rows_of(j0, j1)); });
  }

  // sums[query] (+)= dS K.
  void add_to_queries(const TileRows& rows, const KeyTile& keys, bool careful, bool accumulate, float* sums,
                      int64_t ld) {
    const Phase phase(kToQueries);
    if (careful) {
      if (!accumulate)
        for (int i = 0; i < rows.rows; ++i)
          __builtin_memset(sums + i * ld, 0, (size_t)p.head_dim * sizeof(float));
      add_visible<E>(rows, keys, dscores, key_rows, key_rows_ld, p.head_dim, sums, ld);
      return;
    }
    const Unit* a = Weights<E>::by_rows(dscores, kScoreLd, rows.rows, rows.last_column(keys, 0), ds_by_rows);
    const int padded = (int)round_up(p.head_dim, W);
    gemm<E, false>(
        padded, a, Weights<E>::kRowsLd, key_rows, kNR, key_rows_ld, sums, ld, accumulate,
        [&](int, int) { return Range{0, rows.rows}; }, [&](int, int) { return Range{0, padded}; },
        [&](int i0, int i1) { return to_units<E>(rows.columns_of(i0, i1)); });
  }

  bool keys_finite(const KeyTile& keys) const {
    return all_finite(key_rows, key_rows_ld, keys.count, round_up(p.head_dim, W));
  }
};

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_BACKWARD_H
