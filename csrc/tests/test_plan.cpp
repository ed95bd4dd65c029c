// The units of a pass are shared out evenly and the longest first. Work is counted here, by visible pairs,
// and handed out as threads would take it, so that the machine's load has no say.
#include <algorithm>
#include <cmath>
#include <functional>
#include <map>

#include "case.h"
#include "check.h"
#include "cpu/plan.h"
#include "reference.h"

using namespace fastattn_test;
using fastattn::Entry;
using fastattn::EntryList;

namespace {

// Pairs of (row, column) that row range x column range of sequence b sees.
using CountPairs = std::function<int64_t(const Instance&, const Entry&)>;

int64_t pairs(const Instance& x, int64_t b, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const int64_t shift = x.length_k(b) - x.length_q(b);
  int64_t count = 0;
  for (int64_t i = i0; i < std::min(i1, x.length_q(b)); ++i)
    for (int64_t j = j0; j < std::min(j1, x.length_k(b)); ++j)
      count += (!x.what.causal || j <= i + shift) && x.key_visible(b, j);
  return count;
}

int64_t by_query_tiles(const Instance& x, const Entry& entry) {
  const int64_t per_head = fastattn::ceil_div(x.length_q(entry.b), fastattn::kQueryTile);
  int64_t count = 0;
  for (int64_t t = entry.begin; t < entry.end; ++t) {
    const int64_t i0 = t % per_head * fastattn::kQueryTile;
    count += pairs(x, entry.b, i0, i0 + fastattn::kQueryTile, 0, INT64_MAX);
  }
  return count;
}

int64_t by_key_tiles(const Instance& x, const Entry& entry) {
  return pairs(x, entry.b, 0, INT64_MAX, entry.begin * fastattn::kKeyTile, entry.end * fastattn::kKeyTile);
}

int64_t by_sequences(const Instance& x, const Entry& entry) {
  int64_t count = 0;
  for (int64_t b = entry.begin; b < entry.end; ++b) count += pairs(x, b, 0, INT64_MAX, 0, INT64_MAX);
  return count;
}

// The most pairs that one of `threads` gets when each takes the next units as soon as it has done its last,
// relative to an even share. What the largest unit has more than that is not the order's fault.
double imbalance(const Instance& x, const EntryList& list, int64_t heads, int threads, bool turns,
                 const CountPairs& count) {
  const int64_t units = list.count * heads, grain = fastattn::grain_of(units, threads, turns);
  std::vector<int64_t> work(static_cast<size_t>(threads), 0);
  int64_t all = 0, largest = 0;
  for (int64_t u = 0; u < units; u += grain) {
    int64_t taken = 0;
    for (int64_t v = u; v < std::min(u + grain, units); ++v) {
      const int64_t own = count(x, list.data[v / heads]);
      taken += own;
      largest = std::max(largest, own);
    }
    all += taken;
    *std::min_element(work.begin(), work.end()) += taken;
  }
  const double even = std::max(static_cast<double>(all) / threads, static_cast<double>(largest));
  return static_cast<double>(*std::max_element(work.begin(), work.end())) / even;
}

void expect_even(const char* pass, const Instance& x, const EntryList& list, int64_t heads, bool turns,
                 const CountPairs& count) {
  say_current("%s: %s", pass, x.what.describe().c_str());
  CHECK(list.ok && list.count > 0, "no entries");
  for (int threads : {2, 3, 5}) {
    const double found = imbalance(x, list, heads, threads, turns, count);
    CHECK(found < 1.1, "the busiest of %d threads has %.2f times an even share", threads, found);
  }
}

void expect_even_passes(const Instance& x) {
  const Case& c = x.what;
  EntryList queries, keys, bias, relative;
  fastattn::plan_queries(x.problem, queries);
  expect_even("forward", x, queries, c.num_kv_heads, false, by_query_tiles);
  const fastattn::KeyPlan plan = fastattn::plan_keys(x.problem, true, keys);
  expect_even("by keys", x, keys, c.num_kv_heads, plan.split, by_key_tiles);
  std::map<int64_t, int64_t> next;  // per sequence
  for (int64_t e = 0; e < keys.count && plan.split; ++e)
    CHECK(next[keys.data[e].b]++ == keys.data[e].begin, "a key tile comes before the one it waits for");
  if (x.io.dbias.data != nullptr) {
    fastattn::plan_bias(x.problem, x.io.dbias, bias);
    expect_even("bias", x, bias, 1, false, by_query_tiles);
  }
  if (c.relative_bias) {
    fastattn::plan_relative(x.problem, relative);
    expect_even("relative bias", x, relative, c.num_heads, false, by_sequences);
  }
}

TEST(work_is_even_when_causal) {
  Case c;
  c.batch = 1;
  c.seqlen_q = c.seqlen_k = 2048;
  c.head_dim = c.head_dim_v = 1;
  c.causal = true;
  c.bias = Bias::kPerBatch;
  expect_even_passes(Instance(c, Edge::kBack));
}

// The longest sequence last, which whoever takes units in the order of the batch begins when all else is
// done.
TEST(work_is_even_in_ragged_batches) {
  for (bool causal : {false, true})
    for (int64_t heads : {1, 2}) {
      Case c;
      c.batch = 40;
      c.num_heads = c.num_kv_heads = heads;  // fewer than 64 units, and more
      c.head_dim = c.head_dim_v = 1;
      c.causal = causal;
      c.relative_bias = true;
      for (int64_t b = 0; b < c.batch; ++b) {
        c.lengths_q.push_back(16 + 12 * b);
        c.lengths_k.push_back(c.lengths_q.back());
      }
      c.seqlen_q = c.seqlen_k = c.lengths_q.back();
      expect_even_passes(Instance(c, Edge::kBack));
    }
}

TEST(work_is_even_under_a_key_mask) {
  for (int64_t batch : {40, 80}) {  // units are key tiles, and whole sequences
    Case c;
    c.batch = batch;
    c.num_heads = c.num_kv_heads = 1;
    c.seqlen_q = 64, c.seqlen_k = 600;
    c.head_dim = c.head_dim_v = 1;
    c.relative_bias = true;
    c.key_mask = KeyMask::kLeft;
    Instance x(c, Edge::kBack);
    // Each sequence has a tenth more keys than the one before, and the last all.
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t j = 0; j < c.seqlen_k; ++j)
        x.key_mask.data()[b * x.key_mask_stride + j] =
            static_cast<double>(c.seqlen_k - j) <=
            static_cast<double>(c.seqlen_k) * std::pow(0.9, batch - 1 - b);
    expect_even_passes(x);
  }
}

}  // namespace
