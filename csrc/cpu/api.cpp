// The ABI: validate, plan, run the passes.
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "internal.h"
#include "plan.h"

namespace fastattn {
namespace {

fastattn_status run(const fastattn_executor* executor, Worker worker, Work work, const EntryList& list,
                    int64_t heads) {
  if (!list.ok) return fail(FASTATTN_OUT_OF_MEMORY, "no memory for the list of work units.");
  if (list.count == 0) return FASTATTN_OK;
  work.entries = list.data;
  work.heads = heads;
  work.unit_count = list.count * heads;
  work.grain =
      grain_of(work.unit_count, executor == nullptr ? 1 : executor->num_threads, work.turns != nullptr);
  run_on_threads(executor, worker, &work);
  if (work.out_of_memory) return fail(FASTATTN_OUT_OF_MEMORY, "no memory for a thread's workspace.");
  return FASTATTN_OK;
}

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

fastattn_status run_query_pass(const fastattn_problem& p, const fastattn_executor* executor,
                               const Kernels& kernels, const Work& work) {
  EntryList list;
  plan_queries(p, list);
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
  EntryList list;
  const KeyPlan plan = plan_keys(p, work.backward->dq.data != nullptr, list);
  const Work by_queries = work;
  fastattn_backward_io without_dq = *work.backward;
  if (plan.dq_by_queries) {
    without_dq.dq.data = nullptr;
    work.backward = &without_dq;
  }

  const bool turns = plan.split && work.backward->dq.data != nullptr;
  if (turns)
    work.turns = (int32_t*)calloc((size_t)(p.batch * p.num_heads * ceil_div(p.seqlen_q, kQueryTile)) + 1, 4);
  // Rows are read by whole vectors, also the last.
  if (plan.shared_sums > 0) work.shared_dq_sums = allocate_sums(plan.shared_sums + 16);
  work.unit_dq_sums = plan.unit_sums;
  *diagonals_found = finds_diagonals(p, *work.backward);
  if (*diagonals_found) {
    for (int64_t e = 0; e < list.count; ++e) list.data[e].slot = e;
    work.diagonal_keys = (plan.split ? 1 : plan.longest) * kKeyTile;
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
  plan_bias(p, io.dbias, list);
  return run(executor, kernels.backward_bias[p.dtype], work, list, io.dbias.stride_h == 0 ? 1 : p.num_heads);
}

fastattn_status run_relative_pass(const fastattn_problem& p, const fastattn_backward_io& io,
                                  const fastattn_executor* executor, const Kernels& kernels, Work work) {
  const int64_t count = p.seqlen_q + p.seqlen_k - 1;
  if (count <= 0) return FASTATTN_OK;
  EntryList list;
  plan_relative(p, list);
  const int64_t parts = list.count;
  if (parts > 1) {
    work.partials = allocate_sums(parts * p.num_heads * count);
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

fastattn_status run_forward(const fastattn_problem& p, const fastattn_executor* executor,
                            const Kernels& kernels, Work work) {
  EntryList whole, parts, merges;
  plan_queries(p, whole);
  const int64_t partials = plan_split_keys(p, whole, parts, merges);
  if (partials == 0) return run(executor, kernels.forward[p.dtype], work, whole, p.num_kv_heads);
  work.partials = allocate_sums(partials);
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

// Positions of about 4096 elements a unit, as above.
fastattn_status rotary(const fastattn_rotary* io, const fastattn_executor* executor) {
  fastattn_status status = validate_rotary(io);
  if (status == FASTATTN_OK) status = validate_executor(executor);
  if (status != FASTATTN_OK || io->batch * io->seqlen == 0) return status;
  const Kernels* kernels = select_kernels(&status);
  if (kernels == nullptr) return status;
  Work work = {};
  work.rotary = io;
  work.unit_count = io->batch * io->seqlen;
  work.grain = std::max<int64_t>(1, 4096 / ((io->num_heads + io->num_kv_heads) * io->head_dim));
  run_on_threads(executor, kernels->rotary[io->dtype], &work);
  return FASTATTN_OK;
}

// Blocks as large as leave every thread several of them, and of one shape as near as may be: a block packs
// its part of the weight anew.
fastattn_status linear(const fastattn_linear* io, const fastattn_executor* executor) {
  fastattn_status status = validate_linear(io);
  if (status == FASTATTN_OK) status = validate_executor(executor);
  if (status != FASTATTN_OK || io->rows == 0) return status;
  const Kernels* kernels = select_kernels(&status);
  if (kernels == nullptr) return status;
  const int64_t threads = executor == nullptr ? 1 : executor->num_threads;
  const int64_t across = ceil_div(io->out_features, kLinearColumns);
  const int64_t down = std::min(std::max(ceil_div(io->rows, kLinearRows), ceil_div(4 * threads, across)),
                                ceil_div(io->rows, kFewestLinearRows));
  Work work = {};
  work.linear = io;
  work.block_rows = ceil_div(io->rows, down);
  work.block_columns = ceil_div(ceil_div(io->out_features, across), 64) * 64;
  work.unit_count = ceil_div(io->rows, work.block_rows) * ceil_div(io->out_features, work.block_columns);
  work.grain = 1;
  run_on_threads(executor, kernels->linear, &work);
  if (work.out_of_memory != 0) return fail(FASTATTN_OUT_OF_MEMORY, "no memory for a packed weight.");
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

extern "C" fastattn_status fastattn_cpu_rotary(const fastattn_rotary* io, const fastattn_executor* executor) {
  return fastattn::rotary(io, executor);
}

extern "C" fastattn_status fastattn_cpu_linear(const fastattn_linear* io, const fastattn_executor* executor) {
  return fastattn::linear(io, executor);
}

extern "C" fastattn_status fastattn_cpu_dropout_mask(uint64_t seed, float dropout_p, int64_t batch,
                                                     int64_t num_heads, int64_t seqlen_q, int64_t seqlen_k,
                                                     uint8_t* keep) {
  using namespace fastattn;
  fastattn_status status = validate_dropout_mask(dropout_p, batch, num_heads, seqlen_q, seqlen_k, keep);
  if (status != FASTATTN_OK) return status;
  if (batch * num_heads * seqlen_q * seqlen_k == 0) return FASTATTN_OK;
  const Kernels* kernels = select_kernels(&status);
  if (kernels == nullptr) return status;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < num_heads; ++h)
      for (int64_t i = 0; i < seqlen_q; ++i, keep += seqlen_k)
        kernels->dropout_mask(seed, dropout_p, b, h, i, seqlen_k, keep);
  return FASTATTN_OK;
}
