// Every check of the ABI's structs, before the first access to a tensor.
#include <math.h>
#include <stdarg.h>
#include <stdio.h>

#include <initializer_list>
#include <utility>

#include "internal.h"

namespace fastattn {
namespace {

thread_local char last_error[256] = "no error";

#define REQUIRE(condition, ...) \
  if (!(condition)) return fail(FASTATTN_INVALID_ARGUMENT, __VA_ARGS__)
#define CHECK(call)                                                                     \
  do {                                                                                  \
    if (const fastattn_status status_ = (call); status_ != FASTATTN_OK) return status_; \
  } while (0)

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

struct Axis {
  const char* name;
  int64_t size, stride;
};

// Addresses must be computable: no stride is negative, and the last element's offset in bytes fits in 64
// bits.
fastattn_status check_span(const char* name, std::initializer_list<Axis> axes, int64_t row) {
  int64_t span = row;
  for (const Axis& axis : axes) {
    REQUIRE(axis.stride >= 0 || axis.size <= 1, "%s.stride_%s is %lld; it must not be negative.", name,
            axis.name, (long long)axis.stride);
    int64_t step = 0;
    const bool overflows = axis.size > 1 && (__builtin_mul_overflow(axis.size - 1, axis.stride, &step) ||
                                             __builtin_add_overflow(span, step, &span));
    REQUIRE(!overflows && span <= INT64_MAX / 4,
            "%s.stride_%s is %lld; %s would span more than 64-bit addresses.", name, axis.name,
            (long long)axis.stride, name);
  }
  return FASTATTN_OK;
}

// Arrays that one call writes: none holds an element twice, and no two share one.
class Outputs {
 public:
  // Rows of `row` contiguous elements of `width` bytes. The axes have passed check_span.
  fastattn_status add(const char* name, const void* data, int64_t width, std::initializer_list<Axis> axes,
                      int64_t row) {
    if (row <= 0) return FASTATTN_OK;
    Output& added = all_[count_++];
    added = {name, (uintptr_t)data, width, row, {}, 0};
    for (const Axis& axis : axes) {
      if (axis.size == 0) return --count_, FASTATTN_OK;
      if (axis.size == 1) continue;
      int at = added.axes_used++;
      for (; at > 0 && added.axes[at - 1].stride < axis.stride; --at) added.axes[at] = added.axes[at - 1];
      added.axes[at] = axis;
    }
    int64_t inside = row;
    for (int i = added.axes_used - 1; i >= 0; inside += (added.axes[i].size - 1) * added.axes[i].stride, --i)
      REQUIRE(added.axes[i].stride >= inside,
              "%s.stride_%s is %lld; parts of %lld elements that are written would overlap.", name,
              added.axes[i].name, (long long)added.axes[i].stride, (long long)inside);
    for (int i = 0; i + 1 < count_; ++i) {
      const Output& other = all_[i];
      REQUIRE(!holds_start_of(other, added) && !holds_start_of(added, other),
              "%s and %s, which are both written, share memory.", other.name, name);
    }
    return FASTATTN_OK;
  }

 private:
  struct Output {
    const char* name;
    uintptr_t data;
    int64_t width, row;
    Axis axes[4];  // of more than one element, the longest stride first
    int axes_used;
  };

  // Two arrays may lie interleaved in one, as the gradients of a packed projection do; whole ones that
  // overlap hold the start of one another.
  static bool holds_start_of(const Output& a, const Output& b) {
    if (b.data < a.data) return false;
    uintptr_t left = (b.data - a.data) / (uintptr_t)a.width;
    for (int i = 0; i < a.axes_used; ++i) {
      if (left / (uintptr_t)a.axes[i].stride >= (uintptr_t)a.axes[i].size) return false;
      left %= (uintptr_t)a.axes[i].stride;
    }
    return left < (uintptr_t)a.row;
  }

  Output all_[5];
  int count_ = 0;
};

// q, k, v, out or a gradient; one of no rows may be null. `outputs`: null for what is only read.
fastattn_status check_tensor(const char* name, const fastattn_tensor& t, const fastattn_problem& p,
                             bool of_queries, int64_t columns, Outputs* outputs = nullptr) {
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t heads = of_queries ? p.num_heads : p.num_kv_heads;
  const int64_t rows = of_queries ? (packed ? p.total_q : p.seqlen_q) : (packed ? p.total_k : p.seqlen_k);
  if (rows == 0 || (p.batch == 0 && !packed)) return FASTATTN_OK;
  REQUIRE(t.data != nullptr, "%s is a null pointer.", name);
  const std::initializer_list<Axis> axes = {
      {"b", packed ? 1 : p.batch, t.stride_b}, {"h", heads, t.stride_h}, {"n", rows, t.stride_n}};
  CHECK(check_span(name, axes, columns));
  return outputs == nullptr ? FASTATTN_OK
                            : outputs->add(name, t.data, is_fp32(p.dtype) ? 4 : 2, axes, columns);
}

// lse, dlse: a number for each query.
fastattn_status check_statistic(const char* name, const float* data, int64_t stride_b, int64_t stride_h,
                                const fastattn_problem& p, Outputs* outputs = nullptr) {
  const bool packed = p.cu_seqlens_q != nullptr;
  const int64_t rows = packed ? p.total_q : p.seqlen_q;
  if (data == nullptr || rows == 0) return FASTATTN_OK;
  const std::initializer_list<Axis> axes = {{"b", packed ? 1 : p.batch, stride_b},
                                            {"h", p.num_heads, stride_h}};
  CHECK(check_span(name, axes, rows));
  return outputs == nullptr ? FASTATTN_OK : outputs->add(name, data, 4, axes, rows);
}

// The gradient of a bias is summed over the axes of stride 0.
fastattn_status check_bias(const char* name, const fastattn_bias& bias, const fastattn_problem& p,
                           Outputs* outputs = nullptr) {
  if (bias.data == nullptr) return FASTATTN_OK;
  const auto axis = [](const char* axis_name, int64_t size, int64_t stride) {
    return Axis{axis_name, stride == 0 && size > 0 ? 1 : size, stride};
  };
  const std::initializer_list<Axis> axes = {
      axis("b", p.batch, bias.stride_b), axis("h", p.num_heads, bias.stride_h),
      axis("q", p.seqlen_q, bias.stride_q), axis("k", p.seqlen_k, bias.stride_k)};
  CHECK(check_span(name, axes, 1));
  return outputs == nullptr ? FASTATTN_OK : outputs->add(name, bias.data, 4, axes, 1);
}

fastattn_status validate_problem(const fastattn_problem* p) {
  REQUIRE(p != nullptr, "problem is a null pointer.");
  REQUIRE(p->struct_size == sizeof(fastattn_problem),
          "problem.struct_size is %u; this library's problem has %zu bytes.", p->struct_size, sizeof(*p));
  REQUIRE(p->dtype >= FASTATTN_F32 && p->dtype <= FASTATTN_F32_SPLIT_PRODUCTS,
          "dtype is %d; it must be in 0..4.", p->dtype);
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
  CHECK(check_tensor("q", p->q, *p, true, p->head_dim));
  CHECK(check_tensor("k", p->k, *p, false, p->head_dim));
  CHECK(check_tensor("v", p->v, *p, false, p->head_dim_v));
  CHECK(check_bias("bias", p->bias, *p));
  if (p->key_mask != nullptr)
    CHECK(check_span("key_mask", {{"b", p->batch, p->key_mask_stride_b}}, p->seqlen_k));
  if (p->relative_bias != nullptr)
    CHECK(check_span("relative_bias", {{"h", p->num_heads, p->relative_bias_stride_h}},
                     p->seqlen_q + p->seqlen_k));
  if (p->alibi_slopes != nullptr)
    CHECK(check_span("alibi_slopes",
                     {{"b", p->batch, p->alibi_stride_b}, {"h", p->num_heads, p->alibi_stride_h}}, 1));
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

fastattn_status validate_dropout_mask(float p, int64_t batch, int64_t num_heads, int64_t seqlen_q,
                                      int64_t seqlen_k, const uint8_t* keep) {
  CHECK(validate_dropout_p(p));
  int64_t count = 1;
  for (const auto& [name, size] : {std::pair{"batch", batch}, std::pair{"num_heads", num_heads},
                                   std::pair{"seqlen_q", seqlen_q}, std::pair{"seqlen_k", seqlen_k}}) {
    REQUIRE(size >= 0 && size < kMostRows, "%s is %lld; it must be in 0..2^31-1.", name, (long long)size);
    REQUIRE(!__builtin_mul_overflow(count, size, &count), "a mask of that size does not fit into memory.");
  }
  REQUIRE(keep != nullptr || count == 0, "keep is a null pointer.");
  return FASTATTN_OK;
}

fastattn_status validate_hidden_dropout(const fastattn_hidden_dropout* io) {
  REQUIRE(io != nullptr, "io is a null pointer.");
  REQUIRE(io->struct_size == sizeof(*io), "io.struct_size is %u; this library's io has %zu bytes.",
          io->struct_size, sizeof(*io));
  REQUIRE(io->dtype >= FASTATTN_F32 && io->dtype <= FASTATTN_BF16, "dtype is %d; it must be 0, 1 or 2.",
          io->dtype);
  REQUIRE(io->reserved0 == 0, "io.reserved0 is %d; it must be 0.", io->reserved0);
  CHECK(validate_dropout_p(io->dropout_p));
  const int64_t limit = INT64_C(1) << 31;
  REQUIRE(io->rows >= 0 && io->rows < limit, "rows is %lld; it must be at least 0 and below 2^31.",
          (long long)io->rows);
  REQUIRE(io->columns >= 0 && io->columns < limit, "columns is %lld; it must be at least 0 and below 2^31.",
          (long long)io->columns);
  REQUIRE(io->rows * io->columns == 0 || (io->x != nullptr && io->out != nullptr),
          "x or out is a null pointer.");
  const uintptr_t x = (uintptr_t)io->x, out = (uintptr_t)io->out, apart = x < out ? out - x : x - out;
  REQUIRE(apart == 0 || apart / (io->dtype == FASTATTN_F32 ? 4 : 2) >= (uintptr_t)(io->rows * io->columns),
          "out begins %llu bytes from x, inside it; the two may be the same memory, or memory apart.",
          (unsigned long long)apart);
  if (io->cu_seqlens == nullptr) {
    REQUIRE(io->seqlen >= 1, "seqlen is %lld; it must be positive.", (long long)io->seqlen);
    return FASTATTN_OK;
  }
  REQUIRE(io->batch >= 0 && io->batch < limit, "batch is %lld; it must be at least 0 and below 2^31.",
          (long long)io->batch);
  CHECK(check_offsets("cu_seqlens", io->cu_seqlens, io->batch, io->rows, io->rows));
  REQUIRE(io->cu_seqlens[0] == 0 && io->cu_seqlens[io->batch] == io->rows,
          "cu_seqlens goes from %d to %d; it must be from 0 to the number of rows, %lld.", io->cu_seqlens[0],
          io->cu_seqlens[io->batch], (long long)io->rows);
  return FASTATTN_OK;
}

fastattn_status validate_rotary(const fastattn_rotary* io) {
  REQUIRE(io != nullptr, "io is a null pointer.");
  REQUIRE(io->struct_size == sizeof(*io), "io.struct_size is %u; this library's io has %zu bytes.",
          io->struct_size, sizeof(*io));
  REQUIRE(io->dtype >= FASTATTN_F32 && io->dtype <= FASTATTN_BF16, "dtype is %d; it must be 0, 1 or 2.",
          io->dtype);
  REQUIRE(io->table_dtype == FASTATTN_F32 || io->table_dtype == io->dtype,
          "table_dtype is %d; it must be 0 or dtype, %d.", io->table_dtype, io->dtype);
  REQUIRE(io->transposed == 0 || io->transposed == 1, "transposed is %d; it must be 0 or 1.", io->transposed);
  for (const auto& [name, size] :
       {std::pair{"batch", io->batch}, std::pair{"num_heads", io->num_heads},
        std::pair{"num_kv_heads", io->num_kv_heads}, std::pair{"seqlen", io->seqlen}})
    REQUIRE(size >= 0 && size < kMostRows, "%s is %lld; it must be in 0..2^31-1.", name, (long long)size);
  REQUIRE(io->num_heads >= 1, "num_heads is 0; it must be positive.");
  REQUIRE(io->head_dim >= 1 && io->head_dim <= 256, "head_dim is %lld; it must be in 1..256.",
          (long long)io->head_dim);
  REQUIRE(io->rotary_dim >= 2 && io->rotary_dim <= io->head_dim && io->rotary_dim % 2 == 0,
          "rotary_dim is %lld; it must be even, positive and at most head_dim = %lld.",
          (long long)io->rotary_dim, (long long)io->head_dim);
  if (io->batch * io->seqlen == 0) return FASTATTN_OK;
  Outputs outputs;
  const auto check = [&](const char* name, const fastattn_tensor& t, int64_t heads, bool written) {
    if (heads == 0) return FASTATTN_OK;
    REQUIRE(t.data != nullptr, "%s is a null pointer.", name);
    const std::initializer_list<Axis> axes = {
        {"b", io->batch, t.stride_b}, {"h", heads, t.stride_h}, {"n", io->seqlen, t.stride_n}};
    CHECK(check_span(name, axes, io->head_dim));
    if (!written) return FASTATTN_OK;
    return outputs.add(name, t.data, io->dtype == FASTATTN_F32 ? 4 : 2, axes, io->head_dim);
  };
  CHECK(check("q", io->q, io->num_heads, false));
  CHECK(check("k", io->k, io->num_kv_heads, false));
  CHECK(check("q_out", io->q_out, io->num_heads, true));
  CHECK(check("k_out", io->k_out, io->num_kv_heads, true));
  REQUIRE(io->cos != nullptr && io->sin != nullptr, "cos or sin is a null pointer.");
  CHECK(check_span("cos", {{"b", io->batch, io->cos_stride_b}, {"n", io->seqlen, io->cos_stride_n}},
                   io->rotary_dim));
  return check_span("sin", {{"b", io->batch, io->sin_stride_b}, {"n", io->seqlen, io->sin_stride_n}},
                    io->rotary_dim);
}

fastattn_status validate_linear(const fastattn_linear* io) {
  REQUIRE(io != nullptr, "io is a null pointer.");
  REQUIRE(io->struct_size == sizeof(*io), "io.struct_size is %u; this library's io has %zu bytes.",
          io->struct_size, sizeof(*io));
  REQUIRE(io->transposed == 0 || io->transposed == 1, "transposed is %d; it must be 0 or 1.", io->transposed);
  REQUIRE(io->gelu == 0 || io->gelu == 1, "gelu is %d; it must be 0 or 1.", io->gelu);
  REQUIRE(io->reserved0 == 0, "io.reserved0 is %d; it must be 0.", io->reserved0);
  for (const auto& [name, size] : {std::pair{"rows", io->rows}, std::pair{"in_features", io->in_features},
                                   std::pair{"out_features", io->out_features}})
    REQUIRE(size >= 0 && size < kMostRows, "%s is %lld; it must be in 0..2^31-1.", name, (long long)size);
  REQUIRE(io->in_features >= 1, "in_features is 0; it must be positive.");
  REQUIRE(io->out_features >= 16 && io->out_features % 16 == 0,
          "out_features is %lld; it must be a positive multiple of 16.", (long long)io->out_features);
  if (io->rows == 0) return FASTATTN_OK;
  REQUIRE(io->x != nullptr && io->weight != nullptr && io->out != nullptr,
          "x, weight or out is a null pointer.");
  CHECK(check_span("x", {{"n", io->rows, io->stride_x}}, io->in_features));
  const int64_t weight_rows = io->transposed != 0 ? io->in_features : io->out_features;
  const int64_t weight_columns = io->transposed != 0 ? io->out_features : io->in_features;
  CHECK(check_span("weight", {{"n", weight_rows, io->stride_weight}}, weight_columns));
  Outputs outputs;
  return outputs.add("out", io->out, 4, {{"n", io->rows, io->stride_out}}, io->out_features);
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
  Outputs outputs;
  CHECK(check_tensor("out", r->out, *p, true, p->head_dim_v, &outputs));
  return check_statistic("lse", r->lse, r->lse_stride_b, r->lse_stride_h, *p, &outputs);
}

fastattn_status validate_backward(const fastattn_problem* p, const fastattn_backward_io* io) {
  CHECK(validate_problem(p));
  REQUIRE(io != nullptr, "io is a null pointer.");
  REQUIRE(io->struct_size == sizeof(*io), "io.struct_size is %u; this library's io has %zu bytes.",
          io->struct_size, sizeof(*io));
  REQUIRE(io->reserved0 == 0, "io.reserved0 is %u; it must be 0.", io->reserved0);
  CHECK(check_tensor("out", io->out, *p, true, p->head_dim_v));
  CHECK(check_tensor("dout", io->dout, *p, true, p->head_dim_v));
  Outputs outputs;
  if (io->dq.data) CHECK(check_tensor("dq", io->dq, *p, true, p->head_dim, &outputs));
  if (io->dk.data) CHECK(check_tensor("dk", io->dk, *p, false, p->head_dim, &outputs));
  if (io->dv.data) CHECK(check_tensor("dv", io->dv, *p, false, p->head_dim_v, &outputs));
  CHECK(check_statistic("lse", io->lse, io->lse_stride_b, io->lse_stride_h, *p));
  CHECK(check_statistic("dlse", io->dlse, io->dlse_stride_b, io->dlse_stride_h, *p));
  CHECK(check_bias("dbias", io->dbias, *p, &outputs));
  REQUIRE(no_queries(*p) || io->lse != nullptr, "lse is a null pointer; backward needs forward's lse.");
  REQUIRE(io->dbias.data == nullptr || p->bias.data != nullptr, "dbias is wanted, but there is no bias.");
  REQUIRE(io->drelative_bias == nullptr || p->relative_bias != nullptr,
          "drelative_bias is wanted, but there is no relative_bias.");
  if (io->drelative_bias == nullptr) return FASTATTN_OK;
  const int64_t diagonals = p->seqlen_q + p->seqlen_k - 1;
  const std::initializer_list<Axis> axes = {{"h", p->num_heads, io->drelative_bias_stride_h}};
  CHECK(check_span("drelative_bias", axes, diagonals));
  return outputs.add("drelative_bias", io->drelative_bias, 4, axes, diagonals);
}

}  // namespace fastattn

extern "C" const char* fastattn_last_error(void) { return fastattn::last_error; }
