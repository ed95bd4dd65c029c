// Every check of the ABI's structs that does not need to read device memory.
#include <math.h>
#include <stdarg.h>
#include <stdio.h>

#include "host.h"

namespace fastattn {
namespace {

thread_local char last_error[256] = "no error";

#define REQUIRE(condition, ...) \
  if (!(condition)) return fail(FASTATTN_INVALID_ARGUMENT, __VA_ARGS__)

fastattn_status check_tensor(const char* name, const fastattn_tensor& t, bool empty) {
  REQUIRE(empty || t.data != nullptr, "%s is a null pointer.", name);
  if (t.stride_n > INT32_MAX || t.stride_n < INT32_MIN)
    return fail(FASTATTN_UNSUPPORTED, "stride_n of %s is %lld; it must be below 2^31.", name,
                (long long)t.stride_n);
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

fastattn_status check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return FASTATTN_OK;
  return fail(FASTATTN_DEVICE_ERROR, "%s: %s (%s).", what, cudaGetErrorString(error),
              cudaGetErrorName(error));
}

fastattn_status validate_problem(const fastattn_problem* p) {
  REQUIRE(p != nullptr, "problem is a null pointer.");
  REQUIRE(p->struct_size == sizeof(*p), "problem.struct_size is %u; this library's problem has %zu bytes.",
          p->struct_size, sizeof(*p));
  REQUIRE(p->dtype >= FASTATTN_F32 && p->dtype <= FASTATTN_BF16, "dtype is %d; it must be 0, 1 or 2.",
          p->dtype);
  const struct {
    const char* name;
    int64_t value, least, most;
  } ranges[] = {
      {"batch", p->batch, 0, INT32_MAX},
      {"num_heads", p->num_heads, 1, INT32_MAX},
      {"num_kv_heads", p->num_kv_heads, 1, INT32_MAX},
      {"seqlen_q", p->seqlen_q, 0, kMaxLength},
      {"seqlen_k", p->seqlen_k, 0, kMaxLength},
      {"head_dim", p->head_dim, 1, 256},
      {"head_dim_v", p->head_dim_v, 1, 256},
      {"window_left", p->window_left, -1, INT64_MAX},
      {"window_right", p->window_right, -1, INT64_MAX},
      {"total_q", p->cu_seqlens_q != nullptr ? p->total_q : 0, 0, INT32_MAX},
      {"total_k", p->cu_seqlens_q != nullptr ? p->total_k : 0, 0, INT32_MAX},
      {"problem.reserved0", p->reserved0, 0, 0},
  };
  for (const auto& r : ranges)
    REQUIRE(r.value >= r.least && r.value <= r.most, "%s is %lld; it must be in %lld..%lld.", r.name,
            (long long)r.value, (long long)r.least, (long long)r.most);
  REQUIRE(p->num_heads % p->num_kv_heads == 0, "num_kv_heads is %lld; it must divide num_heads = %lld.",
          (long long)p->num_kv_heads, (long long)p->num_heads);
  REQUIRE(isfinite(p->softmax_scale), "softmax_scale is not finite.");
  REQUIRE(isfinite(p->softcap) && p->softcap >= 0.0f, "softcap is %g; it must be finite and not negative.",
          (double)p->softcap);
  REQUIRE(p->dropout_p >= 0.0f && p->dropout_p < 1.0f,
          "dropout_p is %g; it must be at least 0 and less than 1.", (double)p->dropout_p);
  REQUIRE((p->cu_seqlens_q == nullptr) == (p->cu_seqlens_k == nullptr),
          "cu_seqlens_q and cu_seqlens_k must be given both or neither.");
  REQUIRE(p->cu_seqlens_q == nullptr || p->key_mask == nullptr,
          "key_mask belongs to the padded layout; the packed one has no padding.");
  if (p->bias.data != nullptr && p->bias_dtype != FASTATTN_F32 && p->bias_dtype != p->dtype)
    return fail(FASTATTN_UNSUPPORTED, "bias_dtype is %d; it must be 0 (fp32) or that of q, %d.",
                p->bias_dtype, p->dtype);
  const bool no_keys = p->cu_seqlens_q != nullptr ? p->total_k == 0 : p->batch == 0 || p->seqlen_k == 0;
  fastattn_status status = check_tensor("q", p->q, no_queries(*p));
  if (status == FASTATTN_OK) status = check_tensor("k", p->k, no_keys);
  if (status == FASTATTN_OK) status = check_tensor("v", p->v, no_keys);
  return status;
}

fastattn_status validate_forward(const fastattn_problem* p, const fastattn_forward_result* r) {
  if (const fastattn_status status = validate_problem(p); status != FASTATTN_OK) return status;
  REQUIRE(r != nullptr, "result is a null pointer.");
  REQUIRE(r->struct_size == sizeof(*r), "result.struct_size is %u; this library's result has %zu bytes.",
          r->struct_size, sizeof(*r));
  REQUIRE(r->reserved0 == 0, "result.reserved0 is %u; it must be 0.", r->reserved0);
  return check_tensor("out", r->out, no_queries(*p));
}

fastattn_status validate_backward(const fastattn_problem* p, const fastattn_backward_io* io) {
  if (const fastattn_status status = validate_problem(p); status != FASTATTN_OK) return status;
  REQUIRE(io != nullptr, "io is a null pointer.");
  REQUIRE(io->struct_size == sizeof(*io), "io.struct_size is %u; this library's io has %zu bytes.",
          io->struct_size, sizeof(*io));
  REQUIRE(io->reserved0 == 0, "io.reserved0 is %u; it must be 0.", io->reserved0);
  REQUIRE(no_queries(*p) || io->lse != nullptr, "lse is a null pointer; backward needs forward's lse.");
  REQUIRE(io->dbias.data == nullptr || p->bias.data != nullptr, "dbias is wanted, but there is no bias.");
  REQUIRE(io->drelative_bias == nullptr || p->relative_bias != nullptr,
          "drelative_bias is wanted, but there is no relative_bias.");
  const struct {
    const char* name;
    const fastattn_tensor& tensor;
    bool may_be_null;
  } tensors[] = {{"out", io->out, no_queries(*p)},
                 {"dout", io->dout, no_queries(*p)},
                 {"dq", io->dq, true},
                 {"dk", io->dk, true},
                 {"dv", io->dv, true}};
  for (const auto& t : tensors)
    if (const fastattn_status status = check_tensor(t.name, t.tensor, t.may_be_null); status != FASTATTN_OK)
      return status;
  return FASTATTN_OK;
}

}  // namespace fastattn

extern "C" const char* fastattn_last_error(void) { return fastattn::last_error; }
