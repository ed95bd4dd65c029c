// The passes of the backward: by keys (dk, dv and dq on the way), by queries (dq alone), by cells of a bias, and by
// diagonals of a relative bias. Each sum is formed by one unit, or by units that take turns, in an order that the
// shape alone fixes.
#ifndef FASTATTN_CPU_BACKWARD_PASSES_H
#define FASTATTN_CPU_BACKWARD_PASSES_H

#include <sched.h>

#include "backward.h"

namespace fastattn::FASTATTN_ISA_NS {

// ---- by keys --------------------------------------------------------------------------------

// Where the fp32 sums of a query tile's dq are: (heads, rows, head_dim) of each sequence, or of the packed rows.
inline float* dq_sums_of(const fastattn_problem& p, float* sums, const Sequence& s, int64_t b,
                         const QueryTile& tile) {
  const int64_t row = p.cu_seqlens_q != nullptr ? tile.head * p.total_q + s.q0
                                                : (b * p.num_heads + tile.head) * p.seqlen_q;
  return sums + (row + tile.i0) * p.head_dim;
}

template <class T, class E>
struct KeyPass : Backward<T, E> {
  typedef Backward<T, E> Base;
  using typename Base::Storage;
  using Base::io;
  using Base::p;
  const bool want_dk, want_dq;
  int32_t* const turns;
  float* const shared_dq;
  float *dk, *dv, *dq;

  explicit KeyPass(const Work& work)
      : Base(work, work.backward->dk.data != nullptr || work.backward->dq.data != nullptr,
             work.backward->dv.data != nullptr, false, 1),
        want_dk(io.dk.data != nullptr),
        want_dq(io.dq.data != nullptr),
        turns(work.turns),
        shared_dq(work.dq_sums) {}

  void lay_out(Arena& arena) {
    Base::lay_out(arena);
    dk = arena.take<float>(kKeyTile * this->columns_ld);
    dv = arena.take<float>(kKeyTile * this->columns_v_ld);
    dq = arena.take<float>(kQueryTile * this->columns_ld);
  }

  // Key tiles [entry.begin, entry.end) of one kv head against all queries of its group.
  void run(const Entry& entry, int64_t kv_head) {
    const Sequence s = sequence_of(p, entry.b);
    const Visibility visible = visibility_of(p, s);
    const int64_t tiles = ceil_div(s.nq, kQueryTile) * (p.num_heads / p.num_kv_heads);
    for (int64_t index = entry.begin; index < entry.end; ++index) {
      const int64_t begin = index * kKeyTile, end = begin + kKeyTile < s.nk ? begin + kKeyTile : s.nk;
      KeyTile keys;
      const bool loaded = this->load_keys(s, entry.b, kv_head, begin, end, keys);
      if (want_dk) __builtin_memset(dk, 0, (size_t)(kKeyTile * this->columns_ld) * sizeof(float));
      if (this->want_dv) __builtin_memset(dv, 0, (size_t)(kKeyTile * this->columns_v_ld) * sizeof(float));
      const bool careful = loaded && want_dq && !this->keys_finite(keys);
      for (int64_t t = 0; t < tiles; ++t) {
        const QueryTile tile = query_tile_of(p, s, kv_head, t);
        TileRows rows;
        const bool any = loaded && rows.set(visible, tile.i0, tile.rows, keys);
        if (any) {
          this->load_queries(s, entry.b, tile, *this->queries);
          this->weights_and_gradients(s, entry.b, *this->queries, rows, keys);
          if (this->want_dv)
            this->add_to_keys(rows, keys, this->scores, this->weights, this->queries->dout_rows, this->columns_v_ld,
                              p.head_dim_v, dv);
          if (want_dk)
            this->add_to_keys(rows, keys, this->dscores, this->ds_by_columns, this->queries->q_rows, this->columns_ld,
                              p.head_dim, dk);
          if (want_dq) this->add_to_queries(rows, keys, careful && !rows.full, false, dq);
        }
        if (want_dq) add_dq(s, entry.b, kv_head, tile, t, index, any);
      }
      store_keys(s, entry.b, kv_head, begin, end, loaded ? &keys : nullptr);
    }
  }

 private:
  // Key tile 0 writes the rows of dq, the others add to them, each after the one before it.
  void add_dq(const Sequence& s, int64_t b, int64_t kv_head, const QueryTile& tile, int64_t t, int64_t index,
              bool any) {
    int32_t* turn = turns == nullptr ? nullptr : turns + turn_base(b, kv_head) + t;
    if (turn != nullptr)
      for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != (int32_t)index; ++spins)
        if (spins > 1000) sched_yield();
    int64_t stride;
    float* target = dq_rows(s, b, tile, &stride);
    for (int i = 0; i < tile.rows; ++i) {
      float* row = target + i * stride;
      const float* add = dq + i * this->columns_ld;
      int64_t d = 0;
      const int64_t n = p.head_dim;
      if (index == 0) {
        if (any)
          store_row<F32>(add, 1.0f, n, row);
        else
          __builtin_memset(row, 0, (size_t)n * sizeof(float));
      } else if (any) {
        for (; d + W <= n; d += W) store(row + d, load(row + d) + load(add + d));
        for (; d < n; ++d) row[d] += add[d];
      }
    }
    if (turn != nullptr) __atomic_store_n(turn, (int32_t)index + 1, __ATOMIC_RELEASE);
  }

  int64_t turn_base(int64_t b, int64_t kv_head) const {
    return (b * p.num_kv_heads + kv_head) * ceil_div(p.seqlen_q, kQueryTile) * (p.num_heads / p.num_kv_heads);
  }

  float* dq_rows(const Sequence& s, int64_t b, const QueryTile& tile, int64_t* stride) const {
    if (shared_dq == nullptr) {
      *stride = io.dq.stride_n;
      return row_of<float>(p, io.dq, b, tile.head, s.q0 + tile.i0);
    }
    *stride = p.head_dim;
    return dq_sums_of(p, shared_dq, s, b, tile);
  }

  void store_keys(const Sequence& s, int64_t b, int64_t kv_head, int64_t begin, int64_t end, const KeyTile* keys) {
    for (int64_t j = begin; j < end; ++j) {
      const bool inside = keys != nullptr && j >= keys->begin && j < keys->begin + keys->count;
      const int64_t r = inside ? j - keys->begin : 0;
      // Rows that no query saw are zero; the sums of row 0 times zero would not do where they are not finite.
      const bool zero = !inside || (keys->holes && keys->keep[r] == 0);
      store_gradient(row_of<Storage>(p, io.dk, b, kv_head, s.k0 + j), want_dk, dk + r * this->columns_ld, 1.0f,
                     p.head_dim, zero);
      store_gradient(row_of<Storage>(p, io.dv, b, kv_head, s.k0 + j), this->want_dv, dv + r * this->columns_v_ld,
                     this->dropout.scale, p.head_dim_v, zero);
    }
  }
  static void store_gradient(Storage* target, bool wanted, const float* sums, float factor, int64_t n, bool zero) {
    if (!wanted) return;
    if (zero)
      __builtin_memset(target, 0, (size_t)n * sizeof(Storage));
    else
      store_row<T>(sums, factor, n, target);
  }
};

// fp32 sums of dq to its own dtype, by query tiles.
template <class T, class E>
struct ConvertPass {
  const Work& work;
  explicit ConvertPass(const Work& w) : work(w) {}
  void lay_out(Arena& arena) { arena.take<float>(1); }

  void run(const Entry& entry, int64_t kv_head) {
    const fastattn_problem& p = *work.problem;
    const fastattn_tensor& dq = work.backward->dq;
    const Sequence s = sequence_of(p, entry.b);
    for (int64_t t = entry.begin; t < entry.end; ++t) {
      const QueryTile tile = query_tile_of(p, s, kv_head, t);
      const float* sums = dq_sums_of(p, work.dq_sums, s, entry.b, tile);
      typename T::Storage* target = row_of<typename T::Storage>(p, dq, entry.b, tile.head, s.q0 + tile.i0);
      for (int i = 0; i < tile.rows; ++i)
        store_row<T>(sums + i * p.head_dim, 1.0f, p.head_dim, target + i * dq.stride_n);
    }
  }
};

// ---- by queries -----------------------------------------------------------------------------

template <class T, class E>
struct QueryPass : Backward<T, E> {
  typedef Backward<T, E> Base;
  using typename Base::Storage;
  using Base::io;
  using Base::p;
  float* dq;

  explicit QueryPass(const Work& work) : Base(work, true, false, false, kTilesPerUnit) {}

  void lay_out(Arena& arena) {
    Base::lay_out(arena);
    dq = arena.take<float>(kTilesPerUnit * kQueryTile * this->columns_ld);
  }

  void run(const Entry& entry, int64_t kv_head) {
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
    KeyTile keys;
    for (int64_t j = key_begin; j < key_end; j = (j / kKeyTile + 1) * kKeyTile) {
      const int64_t stop = (j / kKeyTile + 1) * kKeyTile;
      if (!this->load_keys(s, entry.b, kv_head, j, stop < key_end ? stop : key_end, keys)) continue;
      int finite = -1;
      for (int t = 0; t < count; ++t) {
        TileRows rows;
        if (!rows.set(visible, tiles[t].i0, tiles[t].rows, keys)) continue;
        this->weights_and_gradients(s, entry.b, this->queries[t], rows, keys);
        if (!rows.full && finite < 0) finite = this->keys_finite(keys);
        this->add_to_queries(rows, keys, !rows.full && finite == 0, started[t], dq + t * kQueryTile * this->columns_ld);
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
