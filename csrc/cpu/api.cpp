// The ABI: validate, divide the problem into units, run the passes.
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "internal.h"

namespace fastattn {
namespace {

// Fewer units than this are divided further: enough for the threads of a large machine, and a number that
// does not depend on theirs, so that results do not either.
constexpr int64_t kEnoughUnits = 64;

struct EntryList {
  Entry* data = nullptr;
  int64_t count = 0, capacity = 0;
  bool ok = true;

  ~EntryList() { free(data); }
  void add(const Entry& e) {
    if (count == capacity) {
      capacity = capacity == 0 ? 64 : capacity * 2;
      Entry* grown = (Entry*)realloc(data, (size_t)capacity * sizeof(Entry));
      if (grown == nullptr) {
        ok = false;
        count = 0;
        capacity = 0;
        free(data);
        data = nullptr;
        return;
      }
      data = grown;
    }
    data[count++] = e;
  }
};

int64_t query_tiles_of(const fastattn_problem& p, const Sequence& s) {
  return ceil_div(s.nq, kQueryTile) * (p.num_heads / p.num_kv_heads);
}

// Visible (query, key) pairs of query tiles [begin, end) as a measure of their time.
int64_t cost_of_queries(const fastattn_problem& p, const Sequence& s, int64_t b, int64_t begin, int64_t end) {
  const Visibility visible = visibility_of(p, s);
  const int64_t per_head = ceil_div(s.nq, kQueryTile);
  int64_t cost = 0;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t i0 = t % per_head * kQueryTile, i1 = std::min(i0 + kQueryTile, s.nq);
    int64_t first = visible.begin(i0), last = visible.end(i1 - 1);
    if (p.key_mask != nullptr) {
      const uint8_t* mask = p.key_mask + b * p.key_mask_stride_b;
      while (last > first && mask[last - 1] == 0) --last;
      while (first < last && mask[first] == 0) ++first;
    }
    cost += (i1 - i0) * std::max<int64_t>(last - first, 0);
  }
  return cost;
}

void longest_first(EntryList& list) {
  const auto longer = [](const Entry& a, const Entry& b) { return a.cost > b.cost; };
  if (!std::is_sorted(list.data, list.data + list.count, longer))
    std::stable_sort(list.data, list.data + list.count, longer);
}

void query_entries(const fastattn_problem& p, EntryList& list) {
  int64_t tiles = 0;
  for (int64_t b = 0; b < p.batch; ++b) tiles += query_tiles_of(p, sequence_of(p, b));
  int64_t per_unit = most_tiles_per_unit(p);
  while (per_unit > 1 && tiles * p.num_kv_heads < kEnoughUnits * per_unit) per_unit /= 2;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    const int64_t count = query_tiles_of(p, s);
    // Heads that share few-rowed reads of K and V stay together.
    const int64_t step = is_thin(p, s) ? most_tiles_per_unit(p) : per_unit;
    for (int64_t t = 0; t < count; t += step) {
      const int64_t end = std::min(t + step, count);
      list.add({b, t, end, cost_of_queries(p, s, b, t, end)});
    }
  }
  longest_first(list);
}

fastattn_status run(const fastattn_executor* executor, Worker worker, Work work, const EntryList& list,
                    int64_t heads) {
  if (!list.ok) return fail(FASTATTN_OUT_OF_MEMORY, "no memory for the list of work units.");
  if (list.count == 0) return FASTATTN_OK;
  work.entries = list.data;
  work.heads = heads;
  work.unit_count = list.count * heads;
  // A few units at a time let a thread know what it reads next; work that is divided already is handed out
  // singly.
  const int64_t threads = executor == nullptr ? 1 : executor->num_threads;
  work.grain = work.turns != nullptr ? 1 : std::clamp<int64_t>(work.unit_count / (threads * 8), 1, 16);
  run_on_threads(executor, worker, &work);
  if (work.out_of_memory) return fail(FASTATTN_OUT_OF_MEMORY, "no memory for a thread's workspace.");
  return FASTATTN_OK;
}

bool is_fp32(int32_t dtype) { return dtype == FASTATTN_F32 || dtype == FASTATTN_F32_BF16_PRODUCTS; }
size_t element_size(int32_t dtype) { return is_fp32(dtype) ? 4 : 2; }

// Packed rows that belong to no sequence hold zeros.
void zero_rows(const fastattn_tensor& t, int64_t heads, int64_t begin, int64_t end, int64_t n, size_t size) {
  if (t.data == nullptr) return;
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t i = begin; i < end; ++i)
      memset((char*)t.data + (h * t.stride_h + i * t.stride_n) * (int64_t)size, 0, (size_t)n * size);
}
void zero_outside_sequences(const fastattn_problem& p, const int32_t* offsets, int64_t total,
                            const fastattn_tensor& t, int64_t heads, int64_t n) {
  if (offsets == nullptr) return;
  zero_rows(t, heads, 0, offsets[0], n, element_size(p.dtype));
  zero_rows(t, heads, offsets[p.batch], total, n, element_size(p.dtype));
}

// ---- by keys --------------------------------------------------------------------------------

// How the pass by keys is divided, by the shape alone.
struct KeyPlan {
  bool split;  // key tiles are units of their own and take turns at dq; else a unit is a whole kv head
  bool dq_by_queries;              // dq in a pass of its own: 7 products in place of 5, but no sums beside dq
  int64_t shared_sums, unit_sums;  // floats
};

int64_t key_tiles_of(const Sequence& s) { return ceil_div(s.nk, kKeyTile); }

KeyPlan plan_key_pass(const fastattn_problem& p, bool want_dq, int64_t longest) {
  constexpr int64_t kMostSums = INT64_C(3) << 20 >> 2;  // 3 MiB of floats for each thread, or 6 for all
  const int64_t heads = p.batch * p.num_kv_heads;
  KeyPlan plan = {heads < kEnoughUnits && longest > 1, false, 0, 0};
  if (!want_dq || is_fp32(p.dtype) || longest <= 1) return plan;
  const int64_t rows = p.cu_seqlens_q != nullptr ? p.total_q : p.batch * p.seqlen_q;
  const int64_t shared = rows * p.num_heads * p.head_dim;
  const int64_t own = p.seqlen_q * (p.num_heads / p.num_kv_heads) * p.head_dim;
  if (plan.split && shared <= 2 * kMostSums) {
    plan.shared_sums = shared;
  } else if (own <= kMostSums && heads >= kEnoughUnits / 8) {
    plan.split = false;
    plan.unit_sums = own;
  } else {
    plan.dq_by_queries = true;
  }
  return plan;
}

fastattn_status run_query_pass(const fastattn_problem& p, const fastattn_executor* executor,
                               const Kernels& kernels, const Work& work) {
  EntryList list;
  query_entries(p, list);
  return run(executor, kernels.backward_q[p.dtype], work, list, p.num_kv_heads);
}

// Whether a pass by keys that forms dk, or dq on the way, has the dS of a relative bias at hand: a soft cap's
// slope or a scale of 0 would be in it.
bool finds_diagonals(const fastattn_problem& p, const fastattn_backward_io& io) {
  return io.drelative_bias != nullptr && (io.dk.data != nullptr || io.dq.data != nullptr) &&
         p.softcap == 0.0f && p.softmax_scale != 0.0f && p.seqlen_q + p.seqlen_k > 1;
}

// `diagonals_found`: the gradient of the relative bias has been formed too.
fastattn_status run_key_pass(const fastattn_problem& p, const fastattn_executor* executor,
                             const Kernels& kernels, Work work, bool* diagonals_found) {
  int64_t longest = 0;
  bool keyless = false;  // a sequence without keys has no key tile to write its dq
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = sequence_of(p, b);
    longest = std::max(longest, key_tiles_of(s));
    keyless |= s.nk == 0 && s.nq > 0;
  }
  const bool want_dq = work.backward->dq.data != nullptr;
  KeyPlan plan = plan_key_pass(p, want_dq && !keyless, longest);
  plan.dq_by_queries |= want_dq && keyless;
  const Work by_queries = work;
  fastattn_backward_io without_dq = *work.backward;
  if (plan.dq_by_queries) {
    without_dq.dq.data = nullptr;
    work.backward = &without_dq;
  }

  EntryList list;
  if (plan.split) {
    // Ascending key tiles: those that a unit waits for are always taken before it.
    for (int64_t tile = 0; tile < longest; ++tile)
      for (int64_t b = 0; b < p.batch; ++b)
        if (tile < key_tiles_of(sequence_of(p, b))) list.add({b, tile, tile + 1, 0});
  } else {
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence s = sequence_of(p, b);
      list.add({b, 0, key_tiles_of(s), s.nq * s.nk});
    }
    longest_first(list);
  }
  const bool turns = plan.split && work.backward->dq.data != nullptr;
  if (turns)
    work.turns = (int32_t*)calloc((size_t)(p.batch * p.num_heads * ceil_div(p.seqlen_q, kQueryTile)) + 1, 4);
  // Rows are read by whole vectors, also the last.
  if (plan.shared_sums > 0)
    work.shared_dq_sums = (float*)malloc((size_t)(plan.shared_sums + 16) * sizeof(float));
  work.unit_dq_sums = plan.unit_sums;
  *diagonals_found = finds_diagonals(p, *work.backward);
  if (*diagonals_found) {
    for (int64_t e = 0; e < list.count; ++e) list.data[e].slot = e;
    work.diagonal_keys = (plan.split ? 1 : longest) * kKeyTile;
    work.diagonal_turns = (int32_t*)calloc((size_t)p.num_kv_heads, 4);
    for (int64_t h = 0; h < p.num_heads; ++h)
      memset(work.backward->drelative_bias + h * work.backward->drelative_bias_stride_h, 0,
             (size_t)(p.seqlen_q + p.seqlen_k - 1) * sizeof(float));
  }
  fastattn_status status;
  if ((turns && work.turns == nullptr) || (plan.shared_sums > 0 && work.shared_dq_sums == nullptr) ||
      (*diagonals_found && work.diagonal_turns == nullptr))
    status = fail(FASTATTN_OUT_OF_MEMORY, "no memory for the sums of dq.");
  else
    status = run(executor, kernels.backward_kv[p.dtype], work, list, p.num_kv_heads);
  free(work.turns);
  free(work.shared_dq_sums);
  free(work.diagonal_turns);
  if (status == FASTATTN_OK && plan.dq_by_queries) status = run_query_pass(p, executor, kernels, by_queries);
  return status;
}

fastattn_status run_bias_pass(const fastattn_problem& p, const fastattn_backward_io& io,
                              const fastattn_executor* executor, const Kernels& kernels, Work work) {
  EntryList list;
  const int64_t tiles = ceil_div(p.seqlen_q, kQueryTile);
  for (int64_t b = 0; b < (io.dbias.stride_b == 0 ? 1 : p.batch); ++b) {
    if (io.dbias.stride_q == 0)
      list.add({b, 0, tiles, 0});
    else
      for (int64_t t = 0; t < tiles; ++t) list.add({b, t, t + 1, 0});
  }
  return run(executor, kernels.backward_bias[p.dtype], work, list, io.dbias.stride_h == 0 ? 1 : p.num_heads);
}

// Sequences are divided into as many parts as keep a large machine busy in 8 MiB of partial sums, added in
// order.
fastattn_status run_relative_pass(const fastattn_problem& p, const fastattn_backward_io& io,
                                  const fastattn_executor* executor, const Kernels& kernels, Work work) {
  const int64_t count = p.seqlen_q + p.seqlen_k - 1;
  if (count <= 0) return FASTATTN_OK;
  const int64_t affordable = (INT64_C(2) << 20) / (p.num_heads * count);
  const int64_t wanted = std::min({ceil_div(kEnoughUnits, p.num_heads), affordable, p.batch});
  const int64_t length = std::max<int64_t>(ceil_div(p.batch, std::max<int64_t>(wanted, 1)), 1);
  EntryList list;
  for (int64_t b = 0; b < std::max<int64_t>(p.batch, 1); b += length) {
    Entry entry = {0, b, std::min(b + length, p.batch), 0};
    entry.slot = list.count;
    list.add(entry);
  }
  const int64_t parts = list.count;
  if (parts > 1) {
    work.partials = (float*)malloc((size_t)(parts * p.num_heads * count) * sizeof(float));
    if (work.partials == nullptr) return fail(FASTATTN_OUT_OF_MEMORY, "no memory for the sums of diagonals.");
  }
  const fastattn_status status = run(executor, kernels.backward_relative[p.dtype], work, list, p.num_heads);
  for (int64_t h = 0; h < p.num_heads && parts > 1 && status == FASTATTN_OK; ++h) {
    float* sums = io.drelative_bias + h * io.drelative_bias_stride_h;
    for (int64_t d = 0; d < count; ++d) {
      float sum = 0.0f;
      for (int64_t part = 0; part < parts; ++part) sum += work.partials[(part * p.num_heads + h) * count + d];
      sums[d] = sum;
    }
  }
  free(work.partials);
  return status;
}

// Few queries and few units: keys are split as well. Fills both lists and gives the slots' floats; 0: not
// worth it.
int64_t split_keys(const fastattn_problem& p, const EntryList& whole, EntryList& parts, EntryList& merges) {
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

fastattn_status run_forward(const fastattn_problem& p, const fastattn_executor* executor,
                            const Kernels& kernels, Work work) {
  EntryList whole, parts, merges;
  query_entries(p, whole);
  const int64_t partials = split_keys(p, whole, parts, merges);
  if (partials == 0) return run(executor, kernels.forward[p.dtype], work, whole, p.num_kv_heads);
  work.partials = (float*)malloc((size_t)partials * sizeof(float));
  if (work.partials == nullptr) return fail(FASTATTN_OUT_OF_MEMORY, "no memory for partial sums.");
  fastattn_status status = run(executor, kernels.forward[p.dtype], work, parts, p.num_kv_heads);
  if (status == FASTATTN_OK)
    status = run(executor, kernels.forward_merge[p.dtype], work, merges, p.num_kv_heads);
  free(work.partials);
  return status;
}

fastattn_status forward(const fastattn_problem* p, const fastattn_forward_result* result,
                        const fastattn_executor* executor) {
  fastattn_status status = validate_forward(p, result);
  if (status == FASTATTN_OK) status = validate_executor(executor);
  if (status != FASTATTN_OK) return status;
  const Kernels* kernels = select_kernels(&status);
  if (kernels == nullptr) return status;

  zero_outside_sequences(*p, p->cu_seqlens_q, p->total_q, result->out, p->num_heads, p->head_dim_v);
  if (p->cu_seqlens_q != nullptr && p->total_q > 0 && result->lse != nullptr)
    for (int64_t h = 0; h < p->num_heads; ++h) {
      float* lse = result->lse + h * result->lse_stride_h;
      std::fill(lse, lse + p->cu_seqlens_q[0], -__builtin_inff());
      std::fill(lse + p->cu_seqlens_q[p->batch], lse + p->total_q, -__builtin_inff());
    }
  Work work = {};
  work.problem = p;
  work.forward = result;
  return run_forward(*p, executor, *kernels, work);
}

fastattn_status backward(const fastattn_problem* p, const fastattn_backward_io* io,
                         const fastattn_executor* executor) {
  fastattn_status status = validate_backward(p, io);
  if (status == FASTATTN_OK) status = validate_executor(executor);
  if (status != FASTATTN_OK) return status;
  const Kernels* kernels = select_kernels(&status);
  if (kernels == nullptr) return status;

  zero_outside_sequences(*p, p->cu_seqlens_q, p->total_q, io->dq, p->num_heads, p->head_dim);
  zero_outside_sequences(*p, p->cu_seqlens_k, p->total_k, io->dk, p->num_kv_heads, p->head_dim);
  zero_outside_sequences(*p, p->cu_seqlens_k, p->total_k, io->dv, p->num_kv_heads, p->head_dim_v);
  Work work = {};
  work.problem = p;
  work.backward = io;
  bool diagonals_found = false;
  if (io->dk.data != nullptr || io->dv.data != nullptr)
    status = run_key_pass(*p, executor, *kernels, work, &diagonals_found);
  else if (io->dq.data != nullptr)
    status = run_query_pass(*p, executor, *kernels, work);
  if (status != FASTATTN_OK) return status;
  if (io->dbias.data != nullptr) {
    status = run_bias_pass(*p, *io, executor, *kernels, work);
    if (status != FASTATTN_OK) return status;
  }
  if (io->drelative_bias != nullptr && !diagonals_found)
    status = run_relative_pass(*p, *io, executor, *kernels, work);
  return status;
}

// Rows of about 4096 elements a unit: long enough to be worth taking, short enough to be shared out.
fastattn_status hidden_dropout(const fastattn_hidden_dropout* io, const fastattn_executor* executor) {
  fastattn_status status = validate_hidden_dropout(io);
  if (status == FASTATTN_OK) status = validate_executor(executor);
  if (status != FASTATTN_OK || io->rows * io->columns == 0) return status;
  const Kernels* kernels = select_kernels(&status);
  if (kernels == nullptr) return status;
  Work work = {};
  work.hidden_dropout = io;
  work.unit_count = io->rows;
  work.grain = std::max<int64_t>(1, 4096 / io->columns);
  run_on_threads(executor, kernels->hidden_dropout[io->dtype], &work);
  return FASTATTN_OK;
}

}  // namespace
}  // namespace fastattn

extern "C" int32_t fastattn_abi_version(void) { return FASTATTN_ABI_VERSION; }

extern "C" fastattn_status fastattn_cpu_forward(const fastattn_problem* problem,
                                                const fastattn_forward_result* result,
                                                const fastattn_executor* executor) {
  return fastattn::forward(problem, result, executor);
}

extern "C" fastattn_status fastattn_cpu_backward(const fastattn_problem* problem,
                                                 const fastattn_backward_io* io,
                                                 const fastattn_executor* executor) {
  return fastattn::backward(problem, io, executor);
}

extern "C" fastattn_status fastattn_cpu_hidden_dropout(const fastattn_hidden_dropout* io,
                                                       const fastattn_executor* executor) {
  return fastattn::hidden_dropout(io, executor);
}

extern "C" fastattn_status fastattn_cpu_dropout_mask(uint64_t seed, float dropout_p, int64_t batch,
                                                     int64_t num_heads, int64_t seqlen_q, int64_t seqlen_k,
                                                     uint8_t* keep) {
  using namespace fastattn;
  fastattn_status status = validate_dropout_p(dropout_p);
  if (status != FASTATTN_OK) return status;
  if (batch < 0 || num_heads < 0 || seqlen_q < 0 || seqlen_k < 0 || keep == nullptr)
    return fail(FASTATTN_INVALID_ARGUMENT,
                "a size of the dropout mask is negative, or keep is a null pointer.");
  const Kernels* kernels = select_kernels(&status);
  if (kernels == nullptr) return status;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < num_heads; ++h)
      for (int64_t i = 0; i < seqlen_q; ++i, keep += seqlen_k)
        kernels->dropout_mask(seed, dropout_p, b, h, i, seqlen_k, keep);
  return FASTATTN_OK;
}
