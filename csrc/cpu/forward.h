// Forward: a unit is one kv head of one sequence and up to kTilesPerUnit query tiles of the query heads that
// share it. Key tiles are packed once per unit; all of a unit's state stays in L2.
//
//   for each key tile:  pack K^T in panels, V by rows
//     for each query tile:  S = Q K^T;  terms, masks;  P = softmax(S);  dropout;  O += P V
//   O / sum, lse
#ifndef FASTATTN_CPU_FORWARD_H
#define FASTATTN_CPU_FORWARD_H

#include "decode.h"
#include "dropout.h"
#include "phases.h"
#include "score.h"
#include "softmax.h"
#include "unit.h"

namespace fastattn::FASTATTN_ISA_NS {

template <class T, class E>
struct Forward {
  typedef typename T::Storage Storage;
  typedef typename E::Unit Unit;
  static constexpr int kWeightsLd = Weights<E>::kRowsLd;

  const fastattn_problem& p;
  const fastattn_forward_result& result;
  const Dropout dropout;
  const bool has_terms;
  const int64_t depth, depth_ld;  // head_dim in units, and of a row of it
  const int64_t columns_ld;       // of a row of O
  const int64_t values_ld;        // of V
  const int64_t panel_stride;
  const int64_t slots;  // query tiles of a unit
  // Queries whose rows lie close together are read where they are, if they are units already.
  const bool queries_in_place;

  // workspace
  Unit *staging, *panels, *values, *queries, *weights;
  float *scores, *sums, *thin_queries;
  float* const partials;
  RowState* state;

  explicit Forward(const Work& work)
      : p(*work.problem),
        result(*work.forward),
        dropout(p),
        has_terms(has_score_terms(p)),
        depth(ceil_div(p.head_dim, E::kPerUnit)),
        depth_ld(E::kParts * operand_ld(depth)),
        columns_ld(operand_ld(p.head_dim_v)),
        values_ld(E::kParts * columns_ld),
        panel_stride(depth * kPanelLd<E>),
        slots(most_tiles_per_unit(p)),
        queries_in_place(units_in_place<T, E>(p.q, p.head_dim)),
        partials(work.partials) {}

  void lay_out(Arena& arena) {
    staging = arena.take<Unit>(E::kPerUnit == 2 ? kKeyTile * depth_ld : 0);
    panels = arena.take<Unit>((kKeyTile + kNR) / kNR * panel_stride);
    values = arena.take<Unit>(kKeyTile / E::kPerUnit * values_ld);
    queries = arena.take<Unit>(queries_in_place ? 0 : slots * kQueryTile * depth_ld);
    scores = arena.take<float>(kQueryTile * kScoreLd);
    weights = E::kPerUnit == 2 ? arena.take<Unit>(kQueryTile * kWeightsLd) : (Unit*)scores;
    sums = arena.take<float>(slots * kQueryTile * columns_ld);
    thin_queries = arena.take<float>(kThinRows * operand_ld(p.head_dim));
    state = arena.take<RowState>(slots);
  }

  void run(const Entry& entry, int64_t kv_head, const Entry* next, int64_t next_head) {
    const Sequence s = sequence_of(p, entry.b);
    const Visibility visible = visibility_of(p, s);
    const uint8_t* mask = mask_of(p, entry.b);
    const int tile_count = (int)(entry.end - entry.begin);
    QueryTile tiles[kTilesPerUnit];
    const Unit* q[kTilesPerUnit];
    bool started[kTilesPerUnit];
    int64_t row_count = 0;
    for (int t = 0; t < tile_count; ++t) {
      tiles[t] = query_tile_of(p, s, kv_head, entry.begin + t);
      row_count += tiles[t].rows;
      started[t] = false;
      state[t].reset();
    }
    const bool thin = is_thin(p, s);
    for (int t = 0; t < tile_count && !thin; ++t)
      q[t] = load_queries(s, entry.b, tiles[t], queries + t * kQueryTile * depth_ld);

    int64_t key_begin, key_end;
    key_range_of(visible, tiles, tile_count, &key_begin, &key_end);
    if (entry.key_begin > key_begin) key_begin = entry.key_begin;
    if (entry.key_end < key_end) key_end = entry.key_end;
    key_end = keys_before_padding(mask, key_end);
    const Storage* k = row_of<const Storage>(p, p.k, entry.b, kv_head, s.k0);
    const Storage* v = row_of<const Storage>(p, p.v, entry.b, kv_head, s.k0);
    KeyTile keys;
    for (int64_t j = key_begin, after; j < key_end; j = after) {
      after = (j / kKeyTile + 1) * kKeyTile;
      trim_key_tile(mask, j, after < key_end ? after : key_end, keys);
      if (keys.count == 0) continue;
      if (thin) {
        thin_tiles(s, entry.b, visible, tiles, tile_count, keys, k + keys.begin * p.k.stride_n,
                   v + keys.begin * p.v.stride_n, started);
        continue;
      }
      const int32_t* keep = keys.holes ? keys.keep : nullptr;
      {
        const Phase phase(kPacking);
        Panels<T, E>::pack(k + keys.begin * p.k.stride_n, p.k.stride_n, keys.count, p.head_dim, keep, panels,
                           staging);
        Packer<T, E>::interleave(v + keys.begin * p.v.stride_n, p.v.stride_n, keys.count, p.head_dim_v, keep,
                                 values, values_ld, round_up(p.head_dim_v, W));
      }
      Stream stream;
      if (after < key_end) {
        const int64_t count = key_end - after < kKeyTile ? key_end - after : kKeyTile;
        stream.add(k + after * p.k.stride_n, p.k.stride_n, count, p.head_dim);
        stream.add(v + after * p.v.stride_n, p.v.stride_n, count, p.head_dim_v);
      } else if (next != nullptr) {
        announce(*next, next_head, stream);
      }
      stream.start(row_count);
      int finite = -1;  // not looked yet
      for (int t = 0; t < tile_count; ++t) {
        TileRows rows;
        if (!rows.set(visible, tiles[t].i0, tiles[t].rows, keys)) continue;
        if (!rows.full && finite < 0)
          finite = all_finite(values, values_ld, keys.count, round_up(p.head_dim_v, W));
        const bool careful = !rows.full && finite == 0;
        float* sum_rows = sums + t * kQueryTile * columns_ld;
        multiply_scores(rows, keys, q[t]);
        weigh(s, entry.b, tiles[t], rows, keys, careful, state[t], sum_rows, stream);
        add_values(rows, keys, careful, started[t], sum_rows);
        started[t] = true;
      }
    }
    int64_t row = 0;
    for (int t = 0; t < tile_count; row += tiles[t++].rows) {
      float* sum_rows = sums + t * kQueryTile * columns_ld;
      if (!started[t]) __builtin_memset(sum_rows, 0, (size_t)(tiles[t].rows * columns_ld) * sizeof(float));
      if (partials != nullptr)
        keep_partial(entry.slot, kv_head, row, tiles[t].rows, state[t], sum_rows);
      else
        finish(s, entry.b, tiles[t], state[t], sum_rows);
    }
  }

  // A key tile against a handful of queries; see decode.h.
  void thin_tiles(const Sequence& s, int64_t b, const Visibility& visible, const QueryTile* tiles,
                  int tile_count, const KeyTile& keys, const Storage* k, const Storage* v, bool* started) {
    const int64_t ld = operand_ld(p.head_dim);
    Stream nothing;
    for (int t = 0; t < tile_count; ++t) {
      TileRows rows;
      if (!rows.set(visible, tiles[t].i0, tiles[t].rows, keys)) continue;
      float* sum_rows = sums + t * kQueryTile * columns_ld;
      if (!started[t]) __builtin_memset(sum_rows, 0, (size_t)(tiles[t].rows * columns_ld) * sizeof(float));
      started[t] = true;
      load_thin_queries<T>(p, s, b, tiles[t].head, tiles[t].i0, tiles[t].rows, thin_queries, ld);
      {
        const Phase phase(kScores);
        thin_scores<T>(thin_queries, ld, tiles[t].rows, k, p.k.stride_n, keys.count, p.head_dim, scores);
      }
      weigh(s, b, tiles[t], rows, keys, true, state[t], sum_rows, nothing);
      const Phase phase(kValues);
      thin_values<T>(rows, keys, scores, v, p.v.stride_n, p.head_dim_v, sum_rows, columns_ld);
    }
  }

  void keep_partial(int64_t slot, int64_t kv_head, int64_t row, int rows, const RowState& row_state,
                    const float* sum_rows) {
    for (int i = 0; i < rows; ++i) {
      float* to = partial_row(p, partials, slot, kv_head, row + i);
      to[0] = row_state.peak[i];
      to[1] = row_state.sum[i];
      __builtin_memcpy(to + 16, sum_rows + i * columns_ld, (size_t)round_up(p.head_dim_v, W) * sizeof(float));
    }
  }

  // The A operand of a query tile, in place or packed into `buffer`.
  const Unit* load_queries(const Sequence& s, int64_t b, const QueryTile& tile, Unit* buffer) const {
    const Phase phase(kPacking);
    const Storage* source = row_of<const Storage>(p, p.q, b, tile.head, s.q0 + tile.i0);
    if (queries_in_place) return (const Unit*)source;
    Packer<T, E>::rows(source, p.q.stride_n, tile.rows, p.head_dim, nullptr, buffer, depth_ld,
                       round_up(depth, W));
    return buffer;
  }

  // What the next unit reads and writes first.
  void announce(const Entry& next, int64_t head, Stream& stream) const {
    const Sequence s = sequence_of(p, next.b);
    const QueryTile tile = query_tile_of(p, s, head, next.begin);
    const int64_t rows = rows_from(s, tile, next.end - next.begin);
    stream.add(row_of<const Storage>(p, p.q, next.b, tile.head, s.q0 + tile.i0), p.q.stride_n, rows,
               p.head_dim);
    stream.add(row_of<const Storage>(p, result.out, next.b, tile.head, s.q0 + tile.i0), result.out.stride_n,
               rows, p.head_dim_v);
    const int64_t keys = keys_before_padding(mask_of(p, next.b), s.nk < kKeyTile ? s.nk : kKeyTile);
    stream.add(row_of<const Storage>(p, p.k, next.b, head, s.k0), p.k.stride_n, keys, p.head_dim);
    stream.add(row_of<const Storage>(p, p.v, next.b, head, s.k0), p.v.stride_n, keys, p.head_dim_v);
  }

  void multiply_scores(const TileRows& rows, const KeyTile& keys, const Unit* q) {
    const Phase phase(kScores);
    gemm<E, false>(
        keys.padded, q, queries_in_place ? depth : depth_ld, panels, panel_stride, kPanelLd<E>, scores,
        kScoreLd, false, [&](int c0, int c1) { return rows.rows_of(c0, c1); },
        [&](int i0, int i1) { return rows.columns_of(i0, i1); },
        [&](int, int) { return Range{0, (int)depth}; });
  }

  // Scores become weights, in `weights` as the product with V takes them or, `in_place`, in fp32 where the
  // scores were; sums and state are brought to this tile's maxima.
  void weigh(const Sequence& s, int64_t b, const QueryTile& tile, const TileRows& rows, const KeyTile& keys,
             bool in_place, RowState& row_state, float* sum_rows, Stream& stream) {
    const Phase phase(kRows);
    const auto all_rows =
        in_place || E::kPerUnit == 1
            ? (dropout.active ? &Forward::weigh_rows<true, true> : &Forward::weigh_rows<true, false>)
            : (dropout.active ? &Forward::weigh_rows<false, true> : &Forward::weigh_rows<false, false>);
    (this->*all_rows)(s, b, tile, rows, keys, row_state, sum_rows, stream);
  }

  // W rows at a time: their maxima and sums are reduced together, and the next rows are read, for their
  // maxima, while these are computed.
  template <bool kInPlace, bool kDropout>
  void weigh_rows(const Sequence& s, int64_t b, const QueryTile& tile, const TileRows& rows,
                  const KeyTile& keys, RowState& row_state, float* sum_rows, Stream& stream) {
    const float scale = has_terms ? 1.0f : p.softmax_scale;
    int32_t keep[kKeyTile + kDropoutLanes];
    vf maxima[W], totals[W];
    for (int i = 0; i < W; ++i) maxima[i] = complete_row(s, b, tile, rows, keys, i, stream);
    for (int i0 = 0; i0 < tile.rows; i0 += W) {
      RowFactors factors;
      move_peaks(maxima, scale, row_state.peak + i0, factors);
      for (int l = 0; l < W; ++l) {
        const int i = i0 + l;
        maxima[l] = complete_row(s, b, tile, rows, keys, i + W, stream);
        totals[l] = vf{};
        if (i >= tile.rows) continue;
        const int begin = rows.begin[i], end = rows.end[i];
        float* row = scores + i * kScoreLd;
        typename E::Cell* cells = (typename E::Cell*)(weights + i * kWeightsLd);
        if (begin < end) {
          const int first = begin / W * W, last = (int)round_up(end, W);
          if (factors.any_large && factors.scale[l] != scale) round_products(row, first, last, scale);
          if (kDropout) dropout.row(b, tile.head, tile.i0 + i, keys.begin, end, keep);
          totals[l] =
              exponentials(row, first, last, factors.scale[l], factors.offset[l], [&](int c, vf weight) {
                if constexpr (kDropout) weight = as_float(as_int(weight) & load_as<vi>(keep + c));
                if constexpr (kInPlace)
                  store(row + c, weight);
                else
                  Weights<E>::store_cells(cells + c, weight);
              });
        }
        if constexpr (kInPlace)
          zero_outside(row, begin, end, keys.padded);
        else
          for (int part = 0; part < E::kParts; ++part)
            zero_outside(cells + part * kWeightsLd, begin, end, keys.padded);
        if (factors.rescale[l] == 1.0f) continue;
        for (int64_t d = 0; d < p.head_dim_v; d += W) {
          float* sum = sum_rows + i * columns_ld + d;
          store(sum, load(sum) * factors.rescale[l]);
        }
      }
      const vf total = reduce_each(totals, [](vf x, vf y) { return x + y; });
      store(row_state.sum + i0, load(row_state.sum + i0) * load(factors.rescale) + total);
    }
  }

  // The scores of row i with all their terms and masks; their maxima by lanes.
  FASTATTN_ALWAYS_MEMBER vf complete_row(const Sequence& s, int64_t b, const QueryTile& tile,
                                         const TileRows& rows, const KeyTile& keys, int i, Stream& stream) {
    if (i >= tile.rows) return splat(-kInf);
    stream.step();
    const int begin = rows.begin[i], end = rows.end[i];
    if (begin >= end) return splat(-kInf);
    float* row = scores + i * kScoreLd;
    const int first = begin / W * W, last = (int)round_up(end, W);
    if (has_terms)
      finish_scores(p, s, b, tile.head, tile.i0 + i, keys.begin + first, end - first, row + first, nullptr);
    mask_row(row, begin, end, keys, -kInf);
    return row_maxima(row, first, last);
  }

  void add_values(const TileRows& rows, const KeyTile& keys, bool careful, bool accumulate, float* sum_rows) {
    const Phase phase(kValues);
    if (careful) {
      if (!accumulate) __builtin_memset(sum_rows, 0, (size_t)(rows.rows * columns_ld) * sizeof(float));
      add_visible<E>(rows, keys, scores, values, values_ld, p.head_dim_v, sum_rows, columns_ld);
      return;
    }
    const int columns = (int)round_up(p.head_dim_v, W);
    gemm<E, false>(
        columns, weights, kWeightsLd, values, kNR, values_ld, sum_rows, columns_ld, accumulate,
        [&](int, int) { return Range{0, rows.rows}; }, [&](int, int) { return Range{0, columns}; },
        [&](int i0, int i1) { return to_units<E>(rows.columns_of(i0, i1)); });
  }

  void finish(const Sequence& s, int64_t b, const QueryTile& tile, const RowState& row_state,
              const float* sum_rows) {
    Storage* out = row_of<Storage>(p, result.out, b, tile.head, s.q0 + tile.i0);
    for (int i = 0; i < tile.rows; ++i) {
      const float total = row_state.sum[i];
      const float factor = total == 0.0f ? 0.0f : dropout.scale / total;
      store_row<T>(sum_rows + i * columns_ld, factor, p.head_dim_v, out + i * result.out.stride_n);
    }
    if (result.lse != nullptr)
      log_sum_exp(
          row_state.peak, row_state.sum, tile.rows,
          scalar_of(p, result.lse, result.lse_stride_b, result.lse_stride_h, b, tile.head, s.q0 + tile.i0));
  }
};

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_FORWARD_H
