// How a pass is divided into units of work and in which order they are handed out: by the problem alone,
// never by the number of threads, so that results do not depend on that either.
#ifndef FASTATTN_CPU_PLAN_H
#define FASTATTN_CPU_PLAN_H

#include "kernels.h"

namespace fastattn {

class EntryList {
 public:
  Entry* data = nullptr;
  int64_t count = 0;
  bool ok = true;  // false: no memory for an entry

  EntryList() = default;
  EntryList(const EntryList&) = delete;
  EntryList& operator=(const EntryList&) = delete;
  ~EntryList();
  void add(const Entry& entry);
  // By cost; entries of equal cost stay in their order.
  void longest_first();

 private:
  int64_t capacity_ = 0;
};

// Forward, and dq alone: query tiles of one kv head's group.
void plan_queries(const fastattn_problem& p, EntryList& list);

// Few queries and few units: keys are split as well. Fills both lists from that of plan_queries and gives the
// floats of the partial sums; 0: not worth it.
int64_t plan_split_keys(const fastattn_problem& p, const EntryList& whole, EntryList& parts,
                        EntryList& merges);

// dk, dv and dq on the way: key tiles of one kv head.
struct KeyPlan {
  bool split;  // key tiles are units of their own and take turns at dq; else a unit is a whole kv head
  bool dq_by_queries;              // dq in a pass of its own: 7 products in place of 5, but no sums beside dq
  int64_t shared_sums, unit_sums;  // floats
  int64_t longest;                 // key tiles of an entry
};
KeyPlan plan_keys(const fastattn_problem& p, bool want_dq, EntryList& list);

// The gradient of a bias: query tiles of the bias's own sequences.
void plan_bias(const fastattn_problem& p, const fastattn_bias& dbias, EntryList& list);

// The gradient of a relative bias: parts of the batch, whose sums are added in the order of their slots.
void plan_relative(const fastattn_problem& p, EntryList& list);

// Units that a thread takes at a time: a few, so that it knows what it reads next, unless they take turns.
int64_t grain_of(int64_t units, int64_t threads, bool turns);

}  // namespace fastattn

#endif  // FASTATTN_CPU_PLAN_H
