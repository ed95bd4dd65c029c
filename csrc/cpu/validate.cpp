// Every check of the ABI's structs, before the first access to a tensor.
#include <math.h>
#include <stdarg.h>
#include <stdio.h>

#include "internal.h"

namespace fastattn {
namespace {

thread_local char last_error[256] = "no error";

#define REQUIRE(condition, ...) \
  if (!(condition)) return fail(FASTATTN_INVALID_ARGUMENT, __VA_ARGS__)
#define CHECK(call) \
  if (const fastattn_status status_ = (call); status_ != FASTATTN_OK) return status_

constexpr int64_t kMostRows = INT64_C(1) << 31;  // the Philox counters are 32-bit words

fastattn_status check_offsets(const char* name, const int32_t* offsets, int64_t batch, int64_t total,
                              int64_t longest) {
  REQUIRE(total >= 0, "total of %s is %lld; it must not be negative.", name, (long long)total);
  REQUIRE(offsets[0] >= 0, "%s[0] is %d; offsets must not be negative.", name, offsets[0]);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = (int64_t)offsets[b + 1] - offsets[b];
    REQUIRE(length >= 0, "%s[%lld] is %d, less than the %d before it; offsets must ascend.", name,
            (long long)(b + 1), offsets[b + 1], offsets[b]);
    REQUIRE(length <= longest, "%s has a sequence of %lld rows, longer than the %lld announced.", name,
            (long long)length, (long long)longest);
  }
  REQUIRE(offsets[batch] <= total, "%s[%lld] is %d; the tensor has only %lld rows.", name, (long long)batch,
          offsets[batch], (long long)total);
  return FASTATTN_OK;
}

// A tensor of no rows may be null.
fastattn_status check_tensor(const char* name, const fastattn_tensor& t, bool empty) {
  REQUIRE(empty || t.data != nullptr, "%s is a null pointer.", name);
  return FASTATTN_OK;
}

fastattn_status validate_problem(const fastattn_problem* p) {
  REQUIRE(p != nullptr, "problem is a null pointer.");
  REQUIRE(p->struct_size == sizeof(fastattn_problem),
          "problem.struct_size is %u; this library's problem has %zu bytes.", p->struct_size, sizeof(*p));
  REQUIRE(p->dtype >= FASTATTN_F32 && p->dtype <= FASTATTN_BF16, "dtype is %d; it must be 0, 1 or 2.",
          p->dtype);
  REQUIRE(p->batch >= 0 && p->batch < kMostRows, "batch is %lld; it must be in 0..2^31-1.",
          (long long)p->batch);
  REQUIRE(p->num_heads >= 1 && p->num_heads < kMostRows, "num_heads is %lld; it must be positive.",
          (long long)p->num_heads);
  REQUIRE(p->num_kv_heads >= 1 && p->num_heads % p->num_kv_heads == 0,
          "num_kv_heads is %lld; it must divide num_heads = %lld.", (long long)p->num_kv_heads,
          (long long)p->num_heads);
  REQUIRE(p->seqlen_q >= 0 && p->seqlen_q < kMostRows, "seqlen_q is %lld; it must be in 0..2^31-1.",
          (long long)p->seqlen_q);
  REQUIRE(p->seqlen_k >= 0 && p->seqlen_k < kMostRows, "seqlen_k is %lld; it must be in 0..2^31-1.",
          (long long)p->seqlen_k);
  REQUIRE(p->head_dim >= 1 && p->head_dim <= 256, "head_dim is %lld; it must be in 1..256.",
          (long long)p->head_dim);
  REQUIRE(p->head_dim_v >= 1 && p->head_dim_v <= 256, "head_dim_v is %lld; it must be in 1..256.",
          (long long)p->head_dim_v);
  REQUIRE(isfinite(p->softmax_scale), "softmax_scale is not finite.");
  REQUIRE(isfinite(p->softcap) && p->softcap >= 0.0f, "softcap is %g; it must be finite and not negative.",
          (double)p->softcap);
  CHECK(validate_dropout_p(p->dropout_p));
  REQUIRE(p->window_left >= -1, "window_left is %lld; it must be -1 or more.", (long long)p->window_left);
  REQUIRE(p->window_right >= -1, "window_right is %lld; it must be -1 or more.", (long long)p->window_right);
  REQUIRE((p->cu_seqlens_q == nullptr) == (p->cu_seqlens_k == nullptr),
          "cu_seqlens_q and cu_seqlens_k must be given both or neither.");
  if (p->cu_seqlens_q != nullptr) {
    REQUIRE(p->key_mask == nullptr, "key_mask belongs to the padded layout; the packed one has no padding.");
    CHECK(check_offsets("cu_seqlens_q", p->cu_seqlens_q, p->batch, p->total_q, p->seqlen_q));
    CHECK(check_offsets("cu_seqlens_k", p->cu_seqlens_k, p->batch, p->total_k, p->seqlen_k));
  }
  REQUIRE(p->bias.data == nullptr || (p->bias_dtype >= FASTATTN_F32 && p->bias_dtype <= FASTATTN_BF16),
          "bias_dtype is %d; it must be 0, 1 or 2.", p->bias_dtype);
  REQUIRE(p->reserved0 == 0, "problem.reserved0 is %d; it must be 0.", p->reserved0);
  const bool packed = p->cu_seqlens_q != nullptr;
  const bool no_queries = packed ? p->total_q == 0 : p->batch == 0 || p->seqlen_q == 0;
  const bool no_keys = packed ? p->total_k == 0 : p->batch == 0 || p->seqlen_k == 0;
  CHECK(check_tensor("q", p->q, no_queries));
  CHECK(check_tensor("k", p->k, no_keys));
  CHECK(check_tensor("v", p->v, no_keys));
  return FASTATTN_OK;
}

bool no_queries(const fastattn_problem& p) {
  return p.cu_seqlens_q != nullptr ? p.total_q == 0 : p.batch == 0 || p.seqlen_q == 0;
}

}  // namespace

fastattn_status fail(fastattn_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

fastattn_status validate_dropout_p(float p) {
  REQUIRE(p >= 0.0f && p < 1.0f, "dropout_p is %g; it must be at least 0 and less than 1.", (double)p);
  return FASTATTN_OK;
}

fastattn_status validate_executor(const fastattn_executor* e) {
  REQUIRE(e == nullptr || e->num_threads >= 1, "executor.num_threads is %d; it must be positive.",
          e->num_threads);
  return FASTATTN_OK;
}

fastattn_status validate_forward(const fastattn_problem* p, const fastattn_forward_result* r) {
  CHECK(validate_problem(p));
  REQUIRE(r != nullptr, "result is a null pointer.");
  REQUIRE(r->struct_size == sizeof(*r), "result.struct_size is %u; this library's result has %zu bytes.",
          r->struct_size, sizeof(*r));
  REQUIRE(r->reserved0 == 0, "result.reserved0 is %u; it must be 0.", r->reserved0);
  return check_tensor("out", r->out, no_queries(*p));
}

fastattn_status validate_backward(const fastattn_problem* p, const fastattn_backward_io* io) {
  CHECK(validate_problem(p));
  REQUIRE(io != nullptr, "io is a null pointer.");
  REQUIRE(io->struct_size == sizeof(*io), "io.struct_size is %u; this library's io has %zu bytes.",
          io->struct_size, sizeof(*io));
  REQUIRE(io->reserved0 == 0, "io.reserved0 is %u; it must be 0.", io->reserved0);
  CHECK(check_tensor("out", io->out, no_queries(*p)));
  CHECK(check_tensor("dout", io->dout, no_queries(*p)));
  REQUIRE(no_queries(*p) || io->lse != nullptr, "lse is a null pointer; backward needs forward's lse.");
  REQUIRE(io->dbias.data == nullptr || p->bias.data != nullptr, "dbias is wanted, but there is no bias.");
  REQUIRE(io->drelative_bias == nullptr || p->relative_bias != nullptr,
          "drelative_bias is wanted, but there is no relative_bias.");
  return FASTATTN_OK;
}

}  // namespace fastattn

extern "C" const char* fastattn_last_error(void) { return fastattn::last_error; }
