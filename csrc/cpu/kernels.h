// What one instruction set offers: worker functions that take units of work until none is left. Called once
// per thread; every unit's result is a function of the unit alone, so the number of threads cannot change a
// bit.
#ifndef FASTATTN_CPU_KERNELS_H
#define FASTATTN_CPU_KERNELS_H

#include "problem.h"

namespace fastattn {

// Sequence b, and query tiles [begin, end) counted over the heads of a group: tile t is query tile t % T of
// the group's head t / T. Key passes use key tiles instead. Every entry stands for num_kv_heads units.
struct Entry {
  int64_t b, begin, end;
  int64_t cost;  // visible (query, key) pairs, for handing out the longest first; see plan.h
  // Few queries against many keys: this part of the keys alone, its sums kept in slot `slot` of
  // Work::partials; a merge entry joins `splits` slots from there on.
  int64_t key_begin = 0, key_end = INT64_MAX, slot = -1, splits = 0;
};

struct Work {
  const fastattn_problem* problem;
  const fastattn_forward_result* forward;
  const fastattn_backward_io* backward;
  const Entry* entries;
  int64_t heads;          // units per entry, head fastest
  int64_t unit_count;     // entries times heads
  int64_t grain;          // units taken at a time
  int64_t next;           // the next unit to be taken, atomically
  float* partials;        // see decode.h; diagonals of a relative bias, by (slot, head)
  int32_t out_of_memory;  // set by a thread that got no workspace
  int32_t* turns;         // key passes: per (b, kv head, query tile) the next key tile that may add to dq
  // Key passes where dq is narrower than fp32 and summed over several key tiles: all its sums, if key tiles
  // of a head are separate units; else the floats that a unit needs for its own.
  float* shared_dq_sums;
  int64_t unit_dq_sums;
  const fastattn_hidden_dropout* hidden_dropout;  // the job of that kernel: its units are blocks of rows
  const fastattn_rotary* rotary;                  // likewise: blocks of positions
  const fastattn_linear* linear;                  // likewise: blocks of rows by blocks of columns
  int64_t block_rows, block_columns;              // of those
  // Key passes that sum the diagonals of a relative bias on the way: per kv head the entry (by its slot) that
  // may add its sums next, and the most keys that an entry has.
  int32_t* diagonal_turns;
  int64_t diagonal_keys;
};

// A linear layer's units: at most so many rows and columns, and so many features of x at a time, that what is
// read of x and of the packed weight sits in L2.
constexpr int64_t kLinearRows = 768, kLinearColumns = 256, kLinearDepth = 384, kFewestLinearRows = 96;

typedef void (*Worker)(Work* work);

constexpr int kDtypes = FASTATTN_F32_SPLIT_PRODUCTS + 1;

struct Kernels {
  const char* name;
  Worker forward[kDtypes];        // by fastattn_dtype
  Worker forward_merge[kDtypes];  // split keys joined, after forward
  Worker backward_kv[kDtypes];    // dk, dv and, where it is wanted too, dq
  Worker backward_q[kDtypes];     // dq alone
  Worker backward_bias[kDtypes];
  Worker backward_relative[kDtypes];
  Worker hidden_dropout[3];
  Worker rotary[3];
  Worker linear;
  void (*dropout_mask)(uint64_t seed, float p, int64_t b, int64_t h, int64_t i, int64_t nk, uint8_t* keep);
};

// The workspace of the calling thread, at least `bytes` and aligned to a cache line; nullptr if there is no
// memory.
void* thread_workspace(size_t bytes);

}  // namespace fastattn

#endif  // FASTATTN_CPU_KERNELS_H
