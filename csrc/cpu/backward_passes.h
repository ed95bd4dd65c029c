// The passes of the backward: by keys (dk, dv and dq on the way), by queries (dq alone), by cells of a bias,
// and by diagonals of a relative bias. Each sum is formed by one unit, or by units that take turns, in an
// order that the shape alone fixes.
#ifndef FASTATTN_CPU_BACKWARD_PASSES_H
#define FASTATTN_CPU_BACKWARD_PASSES_H

#include <sched.h>

#include "backward.h"

namespace fastattn::FASTATTN_ISA_NS {

// ---- by keys --------------------------------------------------------------------------------

template <class T, class E>
struct KeyPass : Backward<T, E> {
  typedef Backward<T, E> Base;
  using Base::io;
  using Base::p;
  using typename Base::Storage;
  const bool want_dq;
  int32_t* const turns;
  float* const shared_dq_sums;
  const int64_t unit_dq_sums;
  int32_t* const diagonal_turns;  // null: no relative bias wants its gradient from this pass
  const int64_t diagonals_ld;     // a unit's sums, of one head of the group
  float *dk, *dv, *dq, *own_dq_sums, *diagonals;

  const bool dk_in_place, dv_in_place;

  explicit KeyPass(const Work& work)
      : Base(work, work.backward->dk.data != nullptr || work.backward->dq.data != nullptr,
             work.backward->dk.data != nullptr, work.backward->dv.data != nullptr, false, 1),
        want_dq(io.dq.data != nullptr),
        turns(work.turns),
        shared_dq_sums(work.shared_dq_sums),
        unit_dq_sums(work.unit_dq_sums),
        diagonal_turns(work.diagonal_turns),
        diagonals_ld(diagonal_turns == nullptr ? 0 : p.seqlen_q + work.diagonal_keys),
        dk_in_place(kFloat && p.head_dim % W == 0),
        dv_in_place(kFloat && p.head_dim_v % W == 0 && !this->dropout.active) {}

  void lay_out(Arena& arena) {
    Base::lay_out(arena);
    dk = arena.take<float>(kKeyTile * this->columns_ld);
    dv = arena.take<float>(kKeyTile * this->columns_v_ld);
    dq = arena.take<float>(kQueryTile * this->columns_ld);
    own_dq_sums = arena.take<float>(unit_dq_sums);
    diagonals = arena.take<float>(group() * diagonals_ld);
  }

  // Key tiles [entry.begin, entry.end) of one kv head against all queries of its group.
  void run(const Entry& entry, int64_t kv_head, const Entry* next, int64_t next_head) {
    const Sequence s = sequence_of(p, entry.b);
    const Visibility visible = visibility_of(p, s);
    const int64_t tiles = ceil_div(s.nq, kQueryTile) * group();
    const int64_t last_key = keys_before_padding(mask_of(p, entry.b), s.nk);
    __builtin_memset(diagonals, 0, (size_t)(group() * diagonals_ld) * sizeof(float));
    for (int64_t index = entry.begin; index < entry.end; ++index) {
      const int64_t begin = index * kKeyTile, end = begin + kKeyTile < s.nk ? begin + kKeyTile : s.nk;
      KeyTile keys;
      const bool loaded = this->load_keys(s, entry.b, kv_head, begin, end, want_dq, keys);
      KeySums sums = key_sums(s, entry.b, kv_head, keys);
      int finite = -1;
      for (int64_t t = 0; t < tiles; ++t) {
        const QueryTile tile = query_tile_of(p, s, kv_head, t);
        TileRows rows;
        const bool any = loaded && rows.set(visible, tile.i0, tile.rows, keys);
        if (any) {
          Stream stream;
          if (t + 1 < tiles) {
            const QueryTile after = query_tile_of(p, s, kv_head, t + 1);
            this->announce_queries(s, entry.b, after, after.rows, stream);
          } else if ((index + 1 == entry.end || (index + 1) * kKeyTile >= last_key) && next != nullptr) {
            this->announce_unit(*next, next_head, 0, 1, next->begin * kKeyTile, stream);
          }
          stream.start(tile.rows);
          const auto& q = *this->queries;
          this->load_queries(s, entry.b, tile, *this->queries);
          this->weights_and_gradients(s, entry.b, q, rows, keys, stream);
          if (this->want_dv)
            this->add_to_keys(rows, keys, this->scores, this->weights, q.dout_rows, q.dout_rows_ld,
                              p.head_dim_v, sums.started, sums.dv, sums.dv_ld);
          if (this->want_dk)
            this->add_to_keys(rows, keys, this->dscores, this->ds_by_columns, q.q_rows, q.q_rows_ld,
                              p.head_dim, sums.started, sums.dk, sums.dk_ld);
          sums.started = true;
          if (diagonal_turns != nullptr) {
            float* own = diagonals + tile.head % group() * diagonals_ld;
            add_diagonals(this->dscores, rows,
                          own + keys.begin - entry.begin * kKeyTile - tile.i0 + s.nq - 1);
          }
          if (want_dq && !rows.full && finite < 0) finite = this->keys_finite(keys);
        }
        if (want_dq)
          add_dq(s, entry.b, kv_head, tile, t, index, any ? &rows : nullptr, keys,
                 any && !rows.full && finite == 0);
      }
      store_keys(s, entry.b, kv_head, begin, end, loaded && sums.started ? &keys : nullptr);
    }
    if (diagonal_turns != nullptr) store_diagonals(s, entry, kv_head);
  }

 private:
  int64_t group() const { return p.num_heads / p.num_kv_heads; }

  static constexpr bool kFloat = SameType<Storage, float>::value;

  // Where the sums over queries are formed: in the gradients themselves where these are whole vectors of
  // floats.
  struct KeySums {
    float *dk, *dv;
    int64_t dk_ld, dv_ld;
    bool started;
  };
  KeySums key_sums(const Sequence& s, int64_t b, int64_t kv_head, const KeyTile& keys) const {
    KeySums sums = {dk, dv, this->columns_ld, this->columns_v_ld, false};
    if (this->want_dk && dk_in_place)
      sums.dk = row_of<float>(p, io.dk, b, kv_head, s.k0 + keys.begin), sums.dk_ld = io.dk.stride_n;
    if (this->want_dv && dv_in_place)
      sums.dv = row_of<float>(p, io.dv, b, kv_head, s.k0 + keys.begin), sums.dv_ld = io.dv.stride_n;
    return sums;
  }

  // dq of a query tile from this key tile. Key tile 0 writes it, the others add to it, each after the one
  // before. A dq narrower than fp32 is summed elsewhere, and written by the last.
  void add_dq(const Sequence& s, int64_t b, int64_t kv_head, const QueryTile& tile, int64_t t, int64_t index,
              const TileRows* rows, const KeyTile& keys, bool careful) {
    Storage* target = row_of<Storage>(p, io.dq, b, tile.head, s.q0 + tile.i0);
    const bool first = index == 0, last = (index + 1) * kKeyTile >= s.nk;
    // This tile's share alone, in `dq`, where the sums are not whole vectors or there is nothing to add it
    // to.
    const bool apart = p.head_dim % W != 0 || (first && last && !kFloat);
    if (rows != nullptr && apart) this->add_to_queries(*rows, keys, careful, false, dq, this->columns_ld);
    int32_t* turn = turns == nullptr ? nullptr : turns + turn_base(b, kv_head) + t;
    if (turn != nullptr) wait_for_turn(turn, index);
    float* sums = dq;
    int64_t ld = this->columns_ld;
    if (kFloat)
      sums = (float*)target, ld = io.dq.stride_n;
    else if (!first || !last)
      sums = dq_sums(s, b, tile), ld = p.head_dim;
    if (rows != nullptr && !apart) {
      this->add_to_queries(*rows, keys, careful, !first, sums, ld);
    } else if (rows == nullptr || sums != dq) {
      for (int i = 0; i < tile.rows; ++i)
        for (int64_t d = 0; d < p.head_dim; ++d)
          sums[i * ld + d] =
              (first ? 0.0f : sums[i * ld + d]) + (rows == nullptr ? 0.0f : dq[i * this->columns_ld + d]);
    }
    if (!kFloat && last)
      for (int i = 0; i < tile.rows; ++i)
        store_row<T>(sums + i * ld, 1.0f, p.head_dim, target + i * io.dq.stride_n);
    if (turn != nullptr) __atomic_store_n(turn, (int32_t)index + 1, __ATOMIC_RELEASE);
  }

  // The units before this one have added theirs: entries take their turns in the order of the list.
  void store_diagonals(const Sequence& s, const Entry& entry, int64_t kv_head) {
    int32_t* turn = diagonal_turns + kv_head;
    wait_for_turn(turn, entry.slot);
    const int64_t first = entry.begin * kKeyTile, stop = entry.end * kKeyTile;
    const int64_t count = s.nq + (stop < s.nk ? stop : s.nk) - first - 1;
    const float scale = 1.0f / this->ds_scale;
    for (int64_t g = 0; g < group() && s.nq > 0; ++g) {
      const float* own = diagonals + g * diagonals_ld;
      float* sums = io.drelative_bias + (kv_head * group() + g) * io.drelative_bias_stride_h + first +
                    p.seqlen_q - s.nq;
      for (int64_t d = 0; d < count; ++d) sums[d] += own[d] * scale;
    }
    __atomic_store_n(turn, (int32_t)entry.slot + 1, __ATOMIC_RELEASE);
  }

  static void wait_for_turn(int32_t* turn, int64_t index) {
    for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != (int32_t)index; ++spins)
      if (spins > 1000) sched_yield();
  }

  int64_t turn_base(int64_t b, int64_t kv_head) const {
    return (b * p.num_kv_heads + kv_head) * ceil_div(p.seqlen_q, kQueryTile) * (p.num_heads / p.num_kv_heads);
  }

  float* dq_sums(const Sequence& s, int64_t b, const QueryTile& tile) const {
    const int64_t group = p.num_heads / p.num_kv_heads;
    if (shared_dq_sums == nullptr) return own_dq_sums + (tile.head % group * s.nq + tile.i0) * p.head_dim;
    const int64_t row =
        p.cu_seqlens_q != nullptr ? tile.head * p.total_q + s.q0 : (b * p.num_heads + tile.head) * p.seqlen_q;
    return shared_dq_sums + (row + tile.i0) * p.head_dim;
  }

  // Sums to gradients. Rows that no query saw are zero, whatever their sums hold.
  void store_keys(const Sequence& s, int64_t b, int64_t kv_head, int64_t begin, int64_t end,
                  const KeyTile* keys) {
    for (int64_t j = begin; j < end; ++j) {
      const bool inside = keys != nullptr && j >= keys->begin && j < keys->begin + keys->count;
      const int64_t r = inside ? j - keys->begin : 0;
      const bool zero = !inside || (keys->holes && keys->keep[r] == 0);
      store_gradient(io.dk, b, kv_head, s.k0 + j, dk_in_place, dk + r * this->columns_ld, 1.0f, p.head_dim,
                     zero);
      store_gradient(io.dv, b, kv_head, s.k0 + j, dv_in_place, dv + r * this->columns_v_ld,
                     this->dropout.scale, p.head_dim_v, zero);
    }
  }
  void store_gradient(const fastattn_tensor& gradient, int64_t b, int64_t kv_head, int64_t row, bool in_place,
                      const float* sums, float factor, int64_t n, bool zero) const {
    if (gradient.data == nullptr) return;
    Storage* target = row_of<Storage>(p, gradient, b, kv_head, row);
    if (zero)
      __builtin_memset(target, 0, (size_t)n * sizeof(Storage));
    else if (!in_place)
      store_row<T>(sums, factor, n, target);
  }
};

// ---- by queries -----------------------------------------------------------------------------

template <class T, class E>
struct QueryPass : Backward<T, E> {
  typedef Backward<T, E> Base;
  using Base::io;
  using Base::p;
  using typename Base::Storage;
  float* dq;

  explicit QueryPass(const Work& work)
      : Base(work, true, false, false, false, (int)most_tiles_per_unit(*work.problem)) {}

  void lay_out(Arena& arena) {
    Base::lay_out(arena);
    dq = arena.take<float>(this->slots * kQueryTile * this->columns_ld);
  }

  void run(const Entry& entry, int64_t kv_head, const Entry* next, int64_t next_head) {
    const Sequence s = sequence_of(p, entry.b);
    const Visibility visible = visibility_of(p, s);
    const int count = (int)(entry.end - entry.begin);
    QueryTile tiles[kTilesPerUnit];
    bool started[kTilesPerUnit];
    for (int t = 0; t < count; ++t) {
      tiles[t] = query_tile_of(p, s, kv_head, entry.begin + t);
      started[t] = false;
      this->load_queries(s, entry.b, tiles[t], this->queries[t]);
    }
    int64_t key_begin, key_end;
    key_range_of(visible, tiles, count, &key_begin, &key_end);
    key_end = keys_before_padding(mask_of(p, entry.b), key_end);
    KeyTile keys;
    for (int64_t j = key_begin; j < key_end; j = (j / kKeyTile + 1) * kKeyTile) {
      const int64_t stop = (j / kKeyTile + 1) * kKeyTile;
      if (!this->load_keys(s, entry.b, kv_head, j, stop < key_end ? stop : key_end, true, keys)) continue;
      Stream stream;
      if (stop < key_end) {
        const int64_t ahead = key_end - stop < kKeyTile ? key_end - stop : kKeyTile;
        stream.add(row_of<const Storage>(p, p.k, entry.b, kv_head, s.k0 + stop), p.k.stride_n, ahead,
                   p.head_dim);
        stream.add(row_of<const Storage>(p, p.v, entry.b, kv_head, s.k0 + stop), p.v.stride_n, ahead,
                   p.head_dim_v);
      } else if (next != nullptr) {
        this->announce_unit(*next, next_head, next->begin, next->end - next->begin, 0, stream);
      }
      stream.start(count * kQueryTile);
      int finite = -1;
      for (int t = 0; t < count; ++t) {
        TileRows rows;
        if (!rows.set(visible, tiles[t].i0, tiles[t].rows, keys)) continue;
        this->weights_and_gradients(s, entry.b, this->queries[t], rows, keys, stream);
        if (!rows.full && finite < 0) finite = this->keys_finite(keys);
        this->add_to_queries(rows, keys, !rows.full && finite == 0, started[t],
                             dq + t * kQueryTile * this->columns_ld, this->columns_ld);
        started[t] = true;
      }
    }
    for (int t = 0; t < count; ++t) {
      Storage* target = row_of<Storage>(p, io.dq, entry.b, tiles[t].head, s.q0 + tiles[t].i0);
      for (int i = 0; i < tiles[t].rows; ++i, target += io.dq.stride_n) {
        if (started[t])
          store_row<T>(dq + (t * kQueryTile + i) * this->columns_ld, 1.0f, p.head_dim, target);
        else
          __builtin_memset(target, 0, (size_t)p.head_dim * sizeof(Storage));
      }
    }
  }
};

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_BACKWARD_PASSES_H
