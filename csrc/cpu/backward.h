// Backward of one score tile, and the passes built on it. For query i and key j, with the forward's lse and
// delta_i = out_i . dout_i - dlse_i:
//
//   P = exp(S - lse)     dP = dO V^T     dS = scale * slope * P (keep dP - delta)
//   dV += (keep P)^T dO     dK += dS^T Q     dQ += dS K
//
// P is recomputed once per tile and every product that was asked for is taken from it. Products nobody asked for
// are not formed.
#ifndef FASTATTN_CPU_BACKWARD_H
#define FASTATTN_CPU_BACKWARD_H

#include "dropout.h"
#include "score.h"
#include "unit.h"

namespace fastattn::FASTATTN_ISA_NS {

template <class T, class E>
struct Backward {
  typedef typename T::Storage Storage;
  typedef typename E::Unit Unit;
  static constexpr bool kPairs = E::kPerUnit == 2;

  const fastattn_problem& p;
  const fastattn_backward_io& io;
  const Dropout dropout;
  const bool has_terms;
  const bool want_ds;   // dP and dS are needed, for dq, dk or a bias
  const bool want_dv;
  const float ds_scale;    // dq and dk take dS times softmax_scale and the slope of the soft cap;
  const bool want_slopes;  // a bias, which is added after both, takes it as it is
  const int slots;       // query tiles held at a time
  const int64_t depth, depth_v, depth_ld, depth_v_ld;  // head dims in units
  const int64_t columns_ld, columns_v_ld;              // head dims in elements

  // What a query tile brings.
  struct Queries {
    QueryTile tile;
    Unit *q, *dout;            // A operands, K = head_dim
    Unit *q_rows, *dout_rows;  // B operands, K = queries
    float lse2[kQueryTile], delta[kQueryTile];
  };
  Queries* queries;
  Unit *staging, *key_panels, *value_panels, *key_rows, *weights, *ds_by_rows, *ds_by_columns;
  float *scores, *dscores, *slopes;

  Backward(const Work& work, bool ds, bool dv, bool for_bias, int query_slots)
      : p(*work.problem),
        io(*work.backward),
        dropout(p),
        has_terms(has_score_terms(p)),
        want_ds(ds),
        want_dv(dv),
        ds_scale(for_bias ? 1.0f : p.softmax_scale),
        want_slopes(ds && !for_bias && p.softcap > 0.0f),
        slots(query_slots),
        depth(ceil_div(p.head_dim, E::kPerUnit)),
        depth_v(ceil_div(p.head_dim_v, E::kPerUnit)),
        depth_ld(operand_ld(depth)),
        depth_v_ld(operand_ld(depth_v)),
        columns_ld(operand_ld(p.head_dim)),
        columns_v_ld(operand_ld(p.head_dim_v)) {}

  void lay_out(Arena& arena) {
    queries = arena.take<Queries>(slots);
    const bool real = queries != nullptr;
    for (int t = 0; t < slots; ++t) {
      Unit* q = arena.take<Unit>(kQueryTile * depth_ld);
      Unit* dout = arena.take<Unit>(kQueryTile * depth_v_ld);
      Unit* q_rows = kPairs ? arena.take<Unit>(kQueryTile / 2 * columns_ld) : q;
      Unit* dout_rows = kPairs ? arena.take<Unit>(kQueryTile / 2 * columns_v_ld) : dout;
      if (!real) continue;
      queries[t].q = q, queries[t].dout = dout;
      queries[t].q_rows = q_rows, queries[t].dout_rows = dout_rows;
    }
    const int64_t panels = (kKeyTile + kNR) / kNR;
    key_rows = arena.take<Unit>(kKeyTile * columns_ld);
    staging = arena.take<Unit>(kKeyTile * (depth_ld > depth_v_ld ? depth_ld : depth_v_ld));
    key_panels = arena.take<Unit>(panels * depth * kNR);
    value_panels = arena.take<Unit>(panels * depth_v * kNR);
    weights = arena.take<Unit>(kPairs ? kQueryTile / 2 * kScoreLd : 0);
    ds_by_rows = arena.take<Unit>(kPairs ? kQueryTile * kScoreLd : 0);
    ds_by_columns = arena.take<Unit>(kPairs ? kQueryTile / 2 * kScoreLd : 0);
    scores = arena.take<float>(kQueryTile * kScoreLd);
    dscores = arena.take<float>(kQueryTile * kScoreLd);
    slopes = arena.take<float>(want_slopes ? kKeyTile : 0);
  }

  const uint8_t* mask_of(int64_t b) const {
    return p.key_mask == nullptr ? nullptr : p.key_mask + b * p.key_mask_stride_b;
  }

  // Key tile `index` of a sequence; false when key_mask hides all of it.
  bool load_keys(const Sequence& s, int64_t b, int64_t kv_head, int64_t begin, int64_t end, KeyTile& keys) {
    trim_key_tile(mask_of(b), begin, end, keys);
    if (keys.count == 0) return false;
    const int32_t* keep = keys.holes ? keys.keep : nullptr;
    const Storage* k = row_of<const Storage>(p, p.k, b, kv_head, s.k0 + keys.begin);
    if (kPairs) {
      Packer<T, E>::rows(k, p.k.stride_n, keys.count, p.head_dim, keep, staging, depth_ld, round_up(depth, W));
      transpose_to_panels(staging, depth_ld, keys.count, depth, key_panels, depth * kNR);
      if (want_ds)
        Packer<T, E>::interleave(k, p.k.stride_n, keys.count, p.head_dim, keep, key_rows, columns_ld,
                                 round_up(p.head_dim, W));
    } else {
      Packer<T, E>::rows(k, p.k.stride_n, keys.count, p.head_dim, keep, key_rows, depth_ld, round_up(depth, W));
      transpose_to_panels(key_rows, depth_ld, keys.count, depth, key_panels, depth * kNR);
    }
    if (want_ds) {
      const Storage* v = row_of<const Storage>(p, p.v, b, kv_head, s.k0 + keys.begin);
      Packer<T, E>::rows(v, p.v.stride_n, keys.count, p.head_dim_v, keep, staging, depth_v_ld,
                         round_up(depth_v, W));
      transpose_to_panels(staging, depth_v_ld, keys.count, depth_v, value_panels, depth_v * kNR);
    }
    return true;
  }

  void load_queries(const Sequence& s, int64_t b, const QueryTile& tile, Queries& q) {
    q.tile = tile;
    const int64_t row0 = s.q0 + tile.i0, h = tile.head;
    const Storage* query = row_of<const Storage>(p, p.q, b, h, row0);
    const Storage* dout = row_of<const Storage>(p, io.dout, b, h, row0);
    Packer<T, E>::rows(query, p.q.stride_n, tile.rows, p.head_dim, nullptr, q.q, depth_ld, round_up(depth, W));
    if (kPairs && want_ds)
      Packer<T, E>::interleave(query, p.q.stride_n, tile.rows, p.head_dim, nullptr, q.q_rows, columns_ld,
                               round_up(p.head_dim, W));
    Packer<T, E>::rows(dout, io.dout.stride_n, tile.rows, p.head_dim_v, nullptr, q.dout, depth_v_ld,
                       round_up(depth_v, W));
    if (kPairs && want_dv)
      Packer<T, E>::interleave(dout, io.dout.stride_n, tile.rows, p.head_dim_v, nullptr, q.dout_rows, columns_v_ld,
                               round_up(p.head_dim_v, W));
    const float* lse = scalar_of(p, io.lse, io.lse_stride_b, io.lse_stride_h, b, h, row0);
    const float* dlse =
        io.dlse == nullptr ? nullptr : scalar_of(p, io.dlse, io.dlse_stride_b, io.dlse_stride_h, b, h, row0);
    const Storage* out = want_ds ? row_of<const Storage>(p, io.out, b, h, row0) : nullptr;
    for (int i = 0; i < tile.rows; ++i) {
      const bool nothing_seen = lse[i] == -kInf;
      q.lse2[i] = nothing_seen ? kInf : lse[i] * kLog2e;
      q.delta[i] = 0.0f;
      if (!want_ds || nothing_seen) continue;
      q.delta[i] = row_dot(out + i * io.out.stride_n, dout + i * io.dout.stride_n) - (dlse == nullptr ? 0.0f : dlse[i]);
    }
  }

  float row_dot(const Storage* a, const Storage* b) const {
    vf sum = {};
    int64_t d = 0;
    for (; d + W <= p.head_dim_v; d += W) sum += T::load(a + d) * T::load(b + d);
    if (d < p.head_dim_v) sum += load_tail<T>(a + d, p.head_dim_v - d) * load_tail<T>(b + d, p.head_dim_v - d);
    return hsum(sum);
  }

  // scores = keep P and, where wanted, dscores = dS; both zero where nothing is visible.
  void weights_and_gradients(const Sequence& s, int64_t b, const Queries& q, const TileRows& rows,
                             const KeyTile& keys) {
    const auto rows_of = [&](int c0, int c1) { return rows.rows_of(c0, c1); };
    gemm<E, false>(keys.padded, q.q, depth_ld, key_panels, depth * kNR, kNR, scores, kScoreLd, false, rows_of,
                   [&](int, int) { return Range{0, (int)depth}; });
    if (want_ds)
      gemm<E, false>(keys.padded, q.dout, depth_v_ld, value_panels, depth_v * kNR, kNR, dscores, kScoreLd, false,
                     rows_of, [&](int, int) { return Range{0, (int)depth_v}; });
    const float scale = has_terms ? 1.0f : p.softmax_scale * kLog2e;
    int32_t keep[kKeyTile + kDropoutLanes];
    for (int i = 0; i < rows.rows; ++i) {
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
      const float offset = q.lse2[i], delta = q.delta[i];
      for (int c = first; c < last; c += W) store(row + c, exp2_nonpositive(load(row + c) * scale - offset));
      if (dropout.active) dropout.row(b, q.tile.head, q.tile.i0 + i, keys.begin, end, keep);
      if (want_ds) {
        for (int c = first; c < last; c += W) {
          vf dp = load(drow + c);
          if (dropout.active) dp = as_float(as_int(dp * dropout.scale) & load_as<vi>(keep + c));
          vf ds = load(row + c) * ds_scale * (dp - delta);
          if (want_slopes) ds = ds * load(slopes + c);
          store(drow + c, ds);
        }
        mask_row(drow, begin, end, keys, 0.0f);
        zero_outside(drow, begin, end, keys.padded);
      }
      if (dropout.active && want_dv)
        for (int c = first; c < last; c += W)
          store(row + c, as_float(as_int(load(row + c)) & load_as<vi>(keep + c)));
      zero_outside(row, begin, end, keys.padded);
    }
  }

  // sums[key] += weights^T rows of the queries: dv from P and dout, dk from dS and q.
  void add_to_keys(const TileRows& rows, const KeyTile& keys, const float* tile, Unit* buffer, const Unit* b,
                   int64_t ld, int64_t columns, float* sums) {
    const Unit* a = Weights<E>::by_columns(tile, kScoreLd, rows.rows, keys.padded, buffer, kScoreLd);
    gemm<E, true>(
        (int)round_up(columns, W), a, kScoreLd, b, kNR, ld, sums, ld, true,
        [&](int, int) { return Range{0, keys.count}; },
        [&](int j0, int j1) { return to_units<E>(rows.rows_of(j0, j1)); });
  }

  // sums[query] (+)= dS K.
  void add_to_queries(const TileRows& rows, const KeyTile& keys, bool careful, bool accumulate, float* sums) {
    if (careful) {
      if (!accumulate) __builtin_memset(sums, 0, (size_t)(rows.rows * columns_ld) * sizeof(float));
      add_visible(rows, keys, dscores, key_rows, columns_ld, p.head_dim, sums, columns_ld);
      return;
    }
    const Unit* a = Weights<E>::by_rows(dscores, kScoreLd, rows.rows, keys.padded, ds_by_rows, kScoreLd);
    gemm<E, false>(
        (int)round_up(p.head_dim, W), a, kScoreLd, key_rows, kNR, columns_ld, sums, columns_ld, accumulate,
        [&](int, int) { return Range{0, rows.rows}; },
        [&](int i0, int i1) { return to_units<E>(rows.columns_of(i0, i1)); });
  }

  bool keys_finite(const KeyTile& keys) const {
    return all_finite(key_rows, columns_ld, keys.count, round_up(p.head_dim, W));
  }
};

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_BACKWARD_H
