#include "plan.h"

#include <stdlib.h>

#include <algorithm>

namespace fastattn {
namespace {

// Fewer units than this are divided further: enough for the threads of a large machine, and a number that
// does not depend on theirs, so that results do not either.
constexpr int64_t kEnoughUnits = 64;

// The (query, key) pairs of a sequence that are visible, as a measure of time: all that causal and window
// leave, between the first and the last key that key_mask lets through.
class Cost {
 public:
  Cost(const fastattn_problem& p, int64_t b)
      : s_(sequence_of(p, b)), visible_(visibility_of(p, s_)), group_(p.num_heads / p.num_kv_heads) {
    last_ = s_.nk;
    if (p.key_mask == nullptr) return;
    const uint8_t* mask = p.key_mask + b * p.key_mask_stride_b;
    while (last_ > 0 && mask[last_ - 1] == 0) --last_;
    while (first_ < last_ && mask[first_] == 0) ++first_;
  }

  // Of query tile t of a head, and keys [begin, end).
  int64_t query_tile(int64_t t, int64_t begin = 0, int64_t end = INT64_MAX) const {
    const int64_t i0 = t * kQueryTile, i1 = std::min(i0 + kQueryTile, s_.nq);
    if (i0 >= i1) return 0;
    const int64_t first = std::max({visible_.begin(i0), first_, begin});
    const int64_t last = std::min({visible_.end(i1 - 1), last_, end});
    return (i1 - i0) * std::max<int64_t>(last - first, 0);
  }
  // Of query tiles [begin, end) counted over the heads of a group.
  int64_t query_tiles(int64_t begin, int64_t end) const {
    const int64_t per_head = ceil_div(s_.nq, kQueryTile);
    int64_t cost = 0;
    for (int64_t t = begin; t < end; ++t) cost += query_tile(t % per_head);
    return cost;
  }
  // Of keys [begin, end) and all queries of a head, or of its group.
  int64_t head(int64_t begin = 0, int64_t end = INT64_MAX) const {
    int64_t cost = 0;
    for (int64_t t = 0; t < ceil_div(s_.nq, kQueryTile); ++t) cost += query_tile(t, begin, end);
    return cost;
  }
  int64_t group(int64_t begin = 0, int64_t end = INT64_MAX) const { return group_ * head(begin, end); }

 private:
  const Sequence s_;
  const Visibility visible_;
  const int64_t group_;
  int64_t first_ = 0, last_ = 0;
};

int64_t query_tiles_of(const fastattn_problem& p, const Sequence& s) {
  return ceil_div(s.nq, kQueryTile) * (p.num_heads / p.num_kv_heads);
}

int64_t key_tiles_of(const Sequence& s) { return ceil_div(s.nk, kKeyTile); }

// Where dq is summed when it is narrower than fp32 and comes from several key tiles.
void choose_sums(const fastattn_problem& p, KeyPlan& plan) {
  constexpr int64_t kMostSums = INT64_C(3) << 20 >> 2;  // 3 MiB of floats for each thread, or 6 for all
  const int64_t rows = p.cu_seqlens_q != nullptr ? p.total_q : p.batch * p.seqlen_q;
  const int64_t shared = rows * p.num_heads * p.head_dim;
  const int64_t own = p.seqlen_q * (p.num_heads / p.num_kv_heads) * p.head_dim;
  if (plan.split && shared <= 2 * kMostSums) {
    plan.shared_sums = shared;
  } else if (own <= kMostSums && p.batch * p.num_kv_heads >= kEnoughUnits / 8) {
    plan.split = false;
    plan.unit_sums = own;
  } else {
    plan.dq_by_queries = true;
  }
}

}  // namespace

EntryList::~EntryList() { free(data); }

void EntryList::add(const Entry& entry) {
  if (count == capacity_) {
    capacity_ = capacity_ == 0 ? 64 : capacity_ * 2;
    Entry* grown = (Entry*)realloc(data, (size_t)capacity_ * sizeof(Entry));
    if (grown == nullptr) {
      ok = false;
      count = 0;
      capacity_ = 0;
      free(data);
      data = nullptr;
      return;
    }
    data = grown;
  }
  data[count++] = entry;
}

void EntryList::longest_first() {
  const auto longer = [](const Entry& a, const Entry& b) { return a.cost > b.cost; };
  if (!std::is_sorted(data, data + count, longer)) std::stable_sort(data, data + count, longer);
}

void plan_queries(const fastattn_problem& p, EntryList& list) {
  int64_t tiles = 0;
  for (int64_t b = 0; b < p.batch; ++b) tiles += query_tiles_of(p, sequence_of(p, b));
  int64_t per_unit = most_tiles_per_unit(p);
  while (per_unit > 1 && tiles * p.num_kv_heads < kEnoughUnits * per_unit) per_unit /= 2;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    const Cost cost(p, b);
    const int64_t count = query_tiles_of(p, s);
    // Heads that share few-rowed reads of K and V stay together.
    const int64_t step = is_thin(p, s) ? most_tiles_per_unit(p) : per_unit;
    for (int64_t t = 0; t < count; t += step) {
      const int64_t end = std::min(t + step, count);
      list.add({b, t, end, cost.query_tiles(t, end)});
    }
  }
  list.longest_first();
}

int64_t plan_split_keys(const fastattn_problem& p, const EntryList& whole, EntryList& parts,
                        EntryList& merges) {
  const int64_t units = whole.count * p.num_kv_heads, group = p.num_heads / p.num_kv_heads;
  constexpr int64_t kPart = 2 * kKeyTile;  // the least that is worth a unit
  if (units == 0 || units >= kEnoughUnits / 2 || p.seqlen_q * group > kQueryTile || p.seqlen_k < 2 * kPart)
    return 0;
  const int64_t wanted = ceil_div(kEnoughUnits, units);
  int64_t slots = 0;
  for (int64_t e = 0; e < whole.count; ++e) {
    const Entry& entry = whole.data[e];
    const int64_t nk = sequence_of(p, entry.b).nk;
    const int64_t length = std::max(kPart, round_up(ceil_div(nk, wanted), kKeyTile));
    Entry merge = entry;
    merge.slot = slots;
    merge.splits = std::max<int64_t>(ceil_div(nk, length), 1);
    merges.add(merge);
    for (int64_t i = 0; i < merge.splits; ++i) {
      Entry part = entry;
      part.key_begin = i * length;
      part.key_end = part.key_begin + length;
      part.slot = slots++;
      parts.add(part);
    }
  }
  return slots * p.num_kv_heads * kQueryTile * (round_up(p.head_dim_v, 16) + 16);
}

KeyPlan plan_keys(const fastattn_problem& p, bool want_dq, EntryList& list) {
  KeyPlan plan = {};
  bool keyless = false;  // a sequence without keys has no key tile to write its dq
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    plan.longest = std::max(plan.longest, key_tiles_of(s));
    keyless |= s.nk == 0 && s.nq > 0;
  }
  plan.split = p.batch * p.num_kv_heads < kEnoughUnits && plan.longest > 1;
  if (want_dq && keyless)
    plan.dq_by_queries = true;
  else if (want_dq && !is_fp32(p.dtype) && plan.longest > 1)
    choose_sums(p, plan);

  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t tiles = key_tiles_of(sequence_of(p, b));
    const Cost cost(p, b);
    if (!plan.split) {
      list.add({b, 0, tiles, cost.group()});
      continue;
    }
    // A unit waits at dq for the tile before it, which must have been taken by then. What ranks a tile is
    // therefore its cost and that of all tiles after it: longest first, it never comes before its
    // predecessor.
    const int64_t first = list.count;
    for (int64_t t = 0; t < tiles; ++t) list.add({b, t, t + 1, cost.group(t * kKeyTile, (t + 1) * kKeyTile)});
    for (int64_t e = list.count - 2; e >= first; --e) list.data[e].cost += list.data[e + 1].cost;
  }
  list.longest_first();
  return plan;
}

void plan_bias(const fastattn_problem& p, const fastattn_bias& dbias, EntryList& list) {
  const bool one_row = dbias.stride_q == 0, one_sequence = dbias.stride_b == 0;
  const int64_t tiles = ceil_div(p.seqlen_q, kQueryTile), entries = one_row ? 1 : tiles;
  for (int64_t b = 0; b < (one_sequence ? 1 : p.batch); ++b)
    for (int64_t t = 0; t < entries; ++t) list.add({b, t, one_row ? tiles : t + 1, 0});
  if (!list.ok) return;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Cost cost(p, b);
    Entry* const own = list.data + (one_sequence ? 0 : b * entries);
    for (int64_t t = 0; t < tiles; ++t) own[one_row ? 0 : t].cost += cost.query_tile(t);
  }
  list.longest_first();
}

void plan_relative(const fastattn_problem& p, EntryList& list) {
  // As many parts as keep a large machine busy in 8 MiB of sums.
  const int64_t affordable = (INT64_C(2) << 20) / (p.num_heads * (p.seqlen_q + p.seqlen_k - 1));
  const int64_t wanted = std::min({ceil_div(kEnoughUnits, p.num_heads), affordable, p.batch});
  const int64_t length = std::max<int64_t>(ceil_div(p.batch, std::max<int64_t>(wanted, 1)), 1);
  for (int64_t b = 0; b < std::max<int64_t>(p.batch, 1); b += length) {
    Entry entry = {0, b, std::min(b + length, p.batch), 0};
    for (int64_t i = entry.begin; i < entry.end; ++i) entry.cost += Cost(p, i).head();
    entry.slot = list.count;
    list.add(entry);
  }
  list.longest_first();
}

int64_t grain_of(int64_t units, int64_t threads, bool turns) {
  return turns ? 1 : std::clamp<int64_t>(units / (threads * 8), 1, 16);
}

}  // namespace fastattn
