// The ABI's structs -> Params, and how the workspace is used.
#include <math.h>
#include <string.h>

#include "host.h"

namespace fastattn {
namespace {

bool packed(const fastattn_problem& p) { return p.cu_seqlens_q != nullptr; }

// Aligned: rows on 16-byte boundaries, a whole number of 16-byte chunks long, and not all the same row
// (tensor maps have no such stride).
TensorArg tensor_arg(const fastattn_problem& p, const fastattn_tensor& t, int64_t dim) {
  const int64_t chunk = 16 / element_bytes(p.dtype);
  TensorArg x{t.data, packed(p) ? 0 : t.stride_b, t.stride_h, int32_t(t.stride_n), false};
  x.aligned = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && x.stride_b % chunk == 0 &&
              x.stride_h % chunk == 0 && x.stride_n % chunk == 0 && x.stride_n != 0 && dim % chunk == 0;
  return x;
}

void align(Plan& plan, const fastattn_problem& p, TensorArg& x, int64_t heads, bool queries, int64_t dim,
           int64_t padded, Workspace& workspace) {
  if (x.aligned || x.data == nullptr) return;
  const int64_t batch = packed(p) ? 1 : p.batch;
  const int64_t rows = packed(p) ? (queries ? p.total_q : p.total_k) : (queries ? p.seqlen_q : p.seqlen_k);
  void* to = workspace.take(batch * heads * rows * padded * element_bytes(p.dtype));
  plan.copies[plan.copy_count++] = {x, to, batch, heads, rows, int(dim), int(padded)};
  x = {to, packed(p) ? 0 : heads * rows * padded, rows * padded, int32_t(padded), true};
}

Plan plan_problem(const fastattn_problem& p, Workspace& workspace) {
  Plan plan;
  memset(&plan, 0, sizeof plan);
  Params& x = plan.params;
  x.batch = int(p.batch), x.heads = int(p.num_heads), x.kv_heads = int(p.num_kv_heads);
  x.group = x.heads / x.kv_heads;
  x.len_q = int(p.seqlen_q), x.len_k = int(p.seqlen_k);
  x.dim = int(p.head_dim), x.dim_v = int(p.head_dim_v);
  const int64_t chunk = 16 / element_bytes(p.dtype);
  x.load_dim = int(ceil_div64(x.dim, chunk) * chunk), x.load_dim_v = int(ceil_div64(x.dim_v, chunk) * chunk);
  x.total_q = p.total_q, x.total_k = p.total_k;
  x.cu_q = p.cu_seqlens_q, x.cu_k = p.cu_seqlens_k;
  x.splits = 1;

  x.scale = p.softmax_scale, x.scale_log2 = p.softmax_scale * kLog2E;
  x.softcap = p.softcap;
  x.softcap_argument = p.softcap > 0.0f ? 2.0f * kLog2E * p.softmax_scale / p.softcap : 0.0f;
  const auto side = [](int64_t n) { return n < 0 || n > kUnlimited ? kUnlimited : int(n); };
  x.left = side(p.window_left);
  x.right = p.causal ? 0 : side(p.window_right);
  x.key_mask = p.key_mask, x.key_mask_stride_b = p.key_mask_stride_b;
  x.bias = {p.bias.data, p.bias.stride_b, p.bias.stride_h, p.bias.stride_q, p.bias.stride_k};
  x.bias_is_float = p.bias_dtype == FASTATTN_F32;
  x.relative_bias = p.relative_bias, x.relative_bias_stride_h = p.relative_bias_stride_h;
  x.alibi_slopes = p.alibi_slopes;
  x.alibi_stride_b = p.alibi_stride_b, x.alibi_stride_h = p.alibi_stride_h;
  x.dropout_threshold = uint32_t(p.dropout_p * 65536.0f + 0.5f);
  x.dropout_scale = 65536.0f / (65536.0f - float(x.dropout_threshold));
  x.dropout_seed = p.dropout_seed;

  x.q = tensor_arg(p, p.q, p.head_dim);
  x.k = tensor_arg(p, p.k, p.head_dim);
  x.v = tensor_arg(p, p.v, p.head_dim_v);
  align(plan, p, x.q, p.num_heads, true, p.head_dim, x.load_dim, workspace);
  align(plan, p, x.k, p.num_kv_heads, false, p.head_dim, x.load_dim, workspace);
  align(plan, p, x.v, p.num_kv_heads, false, p.head_dim_v, x.load_dim_v, workspace);
  return plan;
}

}  // namespace

Plan plan_forward(const fastattn_problem& p, const fastattn_forward_result* r, int num_splits,
                  Workspace& workspace) {
  Plan plan = plan_problem(p, workspace);
  Params& x = plan.params;
  x.splits = num_splits;
  if (num_splits > 1) {
    const int64_t rows = num_splits * p.batch * p.num_heads * p.seqlen_q;
    x.partial_out = static_cast<float*>(workspace.take(rows * p.head_dim_v * 4));
    x.partial_lse = static_cast<float*>(workspace.take(rows * 4));
  }
  if (r == nullptr) return plan;
  x.out = tensor_arg(p, r->out, p.head_dim_v);
  x.lse = {r->lse, packed(p) ? 0 : r->lse_stride_b, r->lse_stride_h};
  return plan;
}

Plan plan_backward(const fastattn_problem& p, const fastattn_backward_io& io, int diagonal_tile,
                   Workspace& workspace) {
  Plan plan = plan_problem(p, workspace);
  Params& x = plan.params;
  x.out = tensor_arg(p, io.out, p.head_dim_v);
  x.dout = tensor_arg(p, io.dout, p.head_dim_v);
  x.lse = {const_cast<float*>(io.lse), packed(p) ? 0 : io.lse_stride_b, io.lse_stride_h};
  x.dlse = {const_cast<float*>(io.dlse), packed(p) ? 0 : io.dlse_stride_b, io.dlse_stride_h};
  align(plan, p, x.dout, p.num_heads, true, p.head_dim_v, x.load_dim_v, workspace);
  x.dq = tensor_arg(p, io.dq, p.head_dim);
  x.dk = tensor_arg(p, io.dk, p.head_dim);
  x.dv = tensor_arg(p, io.dv, p.head_dim_v);
  x.wants_dk = io.dk.data != nullptr, x.wants_dv = io.dv.data != nullptr;

  const int64_t rows = packed(p) ? p.total_q : p.seqlen_q;
  x.rows_stride_h = rows, x.rows_stride_b = packed(p) ? 0 : p.num_heads * rows;
  x.rows = static_cast<RowStatistics*>(
      workspace.take((packed(p) ? 1 : p.batch) * p.num_heads * rows * int64_t(sizeof(RowStatistics))));

  x.dbias = {io.dbias.data, io.dbias.stride_b, io.dbias.stride_h, io.dbias.stride_q, io.dbias.stride_k};
  x.dbias_batch = io.dbias.stride_b == 0 ? 1 : x.batch, x.dbias_heads = io.dbias.stride_h == 0 ? 1 : x.heads;
  x.dbias_q = io.dbias.stride_q == 0 ? 1 : x.len_q, x.dbias_k = io.dbias.stride_k == 0 ? 1 : x.len_k;
  if (io.drelative_bias != nullptr) {
    x.drelative_bias = io.drelative_bias, x.drelative_bias_stride_h = io.drelative_bias_stride_h;
    x.diagonal_tile = diagonal_tile;
    const int64_t q_tiles = ceil_div64(p.seqlen_q, diagonal_tile),
                  k_tiles = ceil_div64(p.seqlen_k, diagonal_tile);
    x.diagonals = q_tiles > 0 && k_tiles > 0 ? int(q_tiles + k_tiles - 1) : 0;
    x.drelative_partial =
        static_cast<float*>(workspace.take(p.num_heads * x.diagonals * int64_t(2) * diagonal_tile * 4));
  }
  return plan;
}

}  // namespace fastattn
