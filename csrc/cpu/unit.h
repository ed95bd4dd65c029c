// Units of work: which rows a unit owns, which keys they see, and how a thread takes the next one.
#ifndef FASTATTN_CPU_UNIT_H
#define FASTATTN_CPU_UNIT_H

#include "tile.h"

namespace fastattn::FASTATTN_ISA_NS {

struct QueryTile {
  int64_t head, i0;  // query head; first row within the sequence
  int rows;
};

inline QueryTile query_tile_of(const fastattn_problem& p, const Sequence& s, int64_t kv_head, int64_t tile) {
  const int64_t per_head = ceil_div(s.nq, kQueryTile), group = p.num_heads / p.num_kv_heads;
  const int64_t i0 = tile % per_head * kQueryTile;
  return {kv_head * group + tile / per_head, i0, (int)(s.nq - i0 < kQueryTile ? s.nq - i0 : kQueryTile)};
}

// A sequence's key mask, or null.
inline const uint8_t* mask_of(const fastattn_problem& p, int64_t b) {
  return p.key_mask == nullptr ? nullptr : p.key_mask + b * p.key_mask_stride_b;
}

// Rows of `tiles` query tiles from the first on, as far as they are of its head.
inline int64_t rows_from(const Sequence& s, const QueryTile& first, int64_t tiles) {
  const int64_t rows = tiles * kQueryTile, left = s.nq - first.i0;
  return rows < left ? rows : left;
}

// The keys that the rows of any of `count` tiles see, from a multiple of kDropoutLanes on.
inline void key_range_of(const Visibility& visible, const QueryTile* tiles, int count, int64_t* begin,
                         int64_t* end) {
  *begin = visible.nk, *end = 0;
  for (int t = 0; t < count; ++t) {
    const int64_t first = visible.begin(tiles[t].i0), last = visible.end(tiles[t].i0 + tiles[t].rows - 1);
    if (first < *begin) *begin = first;
    if (last > *end) *end = last;
  }
  *begin = *begin / kDropoutLanes * kDropoutLanes;
}

// Rows that will be wanted soon. A unit begins with cold data, and a core waits longer for a few kilobytes
// from memory than it needs for a small head, so each row of scores asks for a few rows of what comes next.
class Stream {
 public:
  template <class Storage>
  void add(const Storage* rows, int64_t stride, int64_t count, int64_t n) {
    if (count <= 0) return;
    // Of a single row any stride is allowed.
    sources_[sources_used_++] = {(const char*)rows, count > 1 ? stride * (int64_t)sizeof(Storage) : 0, count,
                                 (n * (int64_t)sizeof(Storage) + 63) / 64};
    if (count > rows_) rows_ = count;
  }
  // Spreads what was added over `steps` steps.
  void start(int64_t steps) { per_step_ = steps > 0 ? ceil_div(rows_, steps) : 0; }
  FASTATTN_ALWAYS_MEMBER void step() {
    const int64_t last = next_ + per_step_ < rows_ ? next_ + per_step_ : rows_;
    for (; next_ < last; ++next_)
      for (int s = 0; s < sources_used_; ++s)
        for (int64_t line = 0; line < (next_ < sources_[s].count ? sources_[s].lines : 0); ++line)
          __builtin_prefetch(sources_[s].rows + next_ * sources_[s].stride + line * 64, 0, 2);
  }

 private:
  struct Source {
    const char* rows;
    int64_t stride, count, lines;
  };
  Source sources_[8];
  int sources_used_ = 0;
  int64_t rows_ = 0, next_ = 0, per_step_ = 0;
};

// Calls body(first, last) for ranges of units until none is left.
template <class Body>
FASTATTN_ALWAYS void take_ranges(Work& work, Body body) {
  for (;;) {
    const int64_t first = __atomic_fetch_add(&work.next, work.grain, __ATOMIC_RELAXED);
    if (first >= work.unit_count) return;
    body(first, first + work.grain < work.unit_count ? first + work.grain : work.unit_count);
  }
}

// Calls body(entry, head, next entry or nullptr, next head) for units until none is left; the next unit is
// known where it is taken together with this one.
template <class Body>
FASTATTN_ALWAYS void take_units(Work& work, int64_t heads, Body body) {
  take_ranges(work, [&](int64_t first, int64_t last) {
    for (int64_t u = first; u < last; ++u) {
      const Entry* next = u + 1 < last ? &work.entries[(u + 1) / heads] : nullptr;
      body(work.entries[u / heads], u % heads, next, (u + 1) % heads);
    }
  });
}

// The thread's workspace, laid out by `kernel`: measured with a null arena first, then for real.
template <class Kernel>
FASTATTN_ALWAYS bool get_workspace(Work& work, Kernel& kernel) {
  Arena measure{0};
  kernel.lay_out(measure);
  Arena arena{(uintptr_t)thread_workspace((size_t)measure.next)};
  if (arena.next == 0) {
    __atomic_store_n(&work.out_of_memory, 1, __ATOMIC_RELAXED);
    return false;
  }
  kernel.lay_out(arena);
  return true;
}

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_UNIT_H
