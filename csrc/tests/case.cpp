#include "case.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace fastattn_test {
namespace {

int64_t longest(const std::vector<int64_t>& lengths) {
  return *std::max_element(lengths.begin(), lengths.end());
}
int64_t total(const std::vector<int64_t>& lengths) {
  return std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
}

GuardedMemory make_offsets_of(const std::vector<int64_t>& lengths, Edge edge) {
  GuardedMemory memory((lengths.size() + 1) * sizeof(int32_t), edge);
  int32_t* offsets = reinterpret_cast<int32_t*>(memory.data());
  offsets[0] = 0;
  for (size_t b = 0; b < lengths.size(); ++b) offsets[b + 1] = offsets[b] + static_cast<int32_t>(lengths[b]);
  return memory;
}

fastattn_tensor tensor_of(const Array& array, bool wanted = true) {
  if (!wanted || !array.exists()) return {};
  return {array.data(), array.stride(0), array.stride(1), array.stride(2)};
}

fastattn_bias bias_of(const Array& array, bool wanted = true) {
  if (!wanted || !array.exists()) return {};
  return {array.data(), array.stride(0), array.stride(1), array.stride(2), array.stride(3)};
}

}  // namespace

std::string Case::describe() const {
  static const char* const kDtypes[] = {"f32", "f16", "bf16", "f32 in bf16", "f32 split"};
  static const char* const kLayouts[] = {"contiguous", "rows first", "gaps"};
  static const char* const kMasks[] = {"none", "right", "left", "holes", "empty row"};
  static const char* const kBiases[] = {"none", "full", "per head", "per batch", "per key"};
  char text[400];
  snprintf(
      text, sizeof text,
      "%s B%lld H%lld/%lld Nq%lld Nk%lld D%lld Dv%lld causal=%d window=(%lld,%lld) softcap=%g p=%g packed=%d "
      "mask=%s bias=%s(%s) relative=%d alibi=%d dlse=%d layout=%s wants=%d%d%d%d%d seed=%llu",
      kDtypes[dtype], (long long)batch, (long long)num_heads, (long long)num_kv_heads, (long long)seqlen_q,
      (long long)seqlen_k, (long long)head_dim, (long long)head_dim_v, causal, (long long)window_left,
      (long long)window_right, softcap, dropout_p, packed(), kMasks[static_cast<int>(key_mask)],
      kBiases[static_cast<int>(bias)], kDtypes[bias_dtype], relative_bias, alibi, dlse,
      kLayouts[static_cast<int>(layout)], want_dq, want_dk, want_dv, want_dbias, want_drelative,
      (unsigned long long)random_seed);
  return text;
}

Case random_case(Random& random) {
  auto below = [&](int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); };
  auto chance = [&](int percent) { return below(100) < percent; };
  auto length = [&] {
    const int64_t sizes[] = {0, 1, 2, 7, 16, 17, 31, 33, 64, 65, 100, 129, 150};
    return chance(4) ? sizes[0] : sizes[1 + below(12)];
  };
  // Now and then several key tiles, in a problem that is small otherwise, because the reference is slow.
  const bool long_keys = chance(15);
  auto length_k = [&](int64_t length_q) {
    const int64_t sizes[] = {255, 256, 257, 300, 513, 700};
    if (long_keys && chance(80)) return sizes[below(6)];
    return chance(55) ? length_q : length();
  };
  const int64_t dims[] = {1, 3, 8, 16, 20, 32, 33, 48, 64, 72, 80, 96, 128, 130, 256};
  const int64_t usual_dims = long_keys ? 9 : 13;
  Case c;
  c.random_seed = random();
  c.dtype = static_cast<int>(below(5));
  c.num_kv_heads = 1 + below(long_keys ? 2 : 3);
  c.num_heads = c.num_kv_heads * (1 + below(long_keys ? 2 : 3));
  c.head_dim = dims[!long_keys && chance(8) ? 13 + below(2) : below(usual_dims)];
  c.head_dim_v = chance(70) ? c.head_dim : dims[below(usual_dims)];
  c.softmax_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(c.head_dim)));
  c.batch = 1 + below(long_keys ? 2 : 3);
  c.seqlen_q = long_keys && chance(10) ? 300 : length();
  c.seqlen_k = length_k(c.seqlen_q);
  if (chance(35)) {
    for (int64_t b = 0; b < c.batch; ++b) {
      c.lengths_q.push_back(chance(10) ? 0 : length());
      c.lengths_k.push_back(length_k(c.lengths_q.back()));
    }
    c.seqlen_q = longest(c.lengths_q);
    c.seqlen_k = longest(c.lengths_k);
  } else if (chance(50)) {
    c.key_mask = static_cast<KeyMask>(1 + below(4));
  }
  c.causal = chance(40);
  const int64_t reach = long_keys ? 400 : 40;
  if (chance(25)) c.window_left = below(reach);
  if (chance(20)) c.window_right = below(reach);
  if (chance(20)) c.softcap = 2.0f;
  if (chance(25)) c.dropout_p = chance(50) ? 0.1f : 0.5f;
  c.dropout_seed = random();
  if (chance(30)) c.bias = static_cast<Bias>(1 + below(4));
  c.bias_dtype = static_cast<int>(below(3));
  c.relative_bias = chance(20) && c.seqlen_q + c.seqlen_k > 0;
  if (chance(20)) c.alibi = static_cast<int>(1 + below(2));
  c.dlse = chance(30);
  c.layout = static_cast<Layout>(below(3));
  if (chance(40)) {
    c.want_dq = chance(50), c.want_dk = chance(50), c.want_dv = chance(50);
    c.want_dbias = chance(50), c.want_drelative = chance(50);
  }
  return c;
}

Instance::Instance(const Case& c, Edge edge) : what(c), edge_(edge) {
  Random random(c.random_seed);
  const int64_t batch = c.packed() ? 1 : c.batch;
  const int64_t rows_q = c.packed() ? total(c.lengths_q) : c.seqlen_q;
  const int64_t rows_k = c.packed() ? total(c.lengths_k) : c.seqlen_k;
  if (c.packed()) {
    offsets_q_ = make_offsets_of(c.lengths_q, edge);
    offsets_k_ = make_offsets_of(c.lengths_k, edge);
  }
  q = rows(c.dtype, batch, c.num_heads, rows_q, c.head_dim);
  k = rows(c.dtype, batch, c.num_kv_heads, rows_k, c.head_dim);
  v = rows(c.dtype, batch, c.num_kv_heads, rows_k, c.head_dim_v);
  out = rows(c.dtype, batch, c.num_heads, rows_q, c.head_dim_v);
  dout = rows(c.dtype, batch, c.num_heads, rows_q, c.head_dim_v);
  dq = rows(c.dtype, batch, c.num_heads, rows_q, c.head_dim);
  dk = rows(c.dtype, batch, c.num_kv_heads, rows_k, c.head_dim);
  dv = rows(c.dtype, batch, c.num_kv_heads, rows_k, c.head_dim_v);
  for (Array* array : {&q, &k}) array->fill(random, c.deviation);
  for (Array* array : {&v, &dout}) array->fill(random, 1.0);

  const int64_t gap = c.layout == Layout::kGaps ? 3 : 0;
  const std::vector<int64_t> lse_stride = {c.num_heads * (rows_q + gap), rows_q + gap, 1, 1};
  lse = Array(FASTATTN_F32, {batch, c.num_heads, rows_q, 1}, lse_stride, edge);
  if (c.dlse) {
    dlse = Array(FASTATTN_F32, {batch, c.num_heads, rows_q, 1}, lse_stride, edge);
    dlse.fill(random, 1.0);
  }
  if (c.key_mask != KeyMask::kNone) make_key_mask(random);
  make_biases(random);
  describe_problem();
  describe_results();
}

Array Instance::rows(int dtype, int64_t batch, int64_t heads, int64_t length, int64_t columns) const {
  std::vector<int64_t> stride;
  switch (what.layout) {
    case Layout::kContiguous:
      stride = {heads * length * columns, length * columns, columns, 1};
      break;
    case Layout::kRowsFirst:
      stride = {length * heads * columns, columns, heads * columns, 1};
      break;
    case Layout::kGaps:
      stride = {heads * (length * (columns + 5) + 7) + 1, length * (columns + 5) + 7, columns + 5, 1};
      break;
  }
  return Array(dtype, {batch, heads, length, columns}, stride, edge_);
}

void Instance::make_key_mask(Random& random) {
  key_mask_stride = what.seqlen_k + (what.layout == Layout::kGaps ? 5 : 0);
  const int64_t bytes = what.seqlen_k == 0 ? 0 : (what.batch - 1) * key_mask_stride + what.seqlen_k;
  key_mask = GuardedMemory(static_cast<size_t>(bytes), edge_);
  for (int64_t b = 0; b < what.batch; ++b) {
    const int64_t hidden =
        what.seqlen_k == 0 ? 0 : static_cast<int64_t>(random() % static_cast<uint64_t>(what.seqlen_k));
    for (int64_t j = 0; j < what.seqlen_k; ++j) {
      bool visible = true;
      if (what.key_mask == KeyMask::kRight) visible = j < what.seqlen_k - hidden;
      if (what.key_mask == KeyMask::kLeft) visible = j >= hidden;
      if (what.key_mask == KeyMask::kHoles) visible = random() % 3 != 0;
      if (what.key_mask == KeyMask::kOneRowEmpty) visible = b != 0;
      key_mask.data()[b * key_mask_stride + j] = visible ? static_cast<uint8_t>(1 + random() % 255) : 0;
      if (visible) continue;
      // What a mask hides may be anything, and must not show.
      for (int64_t h = 0; h < what.num_kv_heads; ++h) {
        for (int64_t d = 0; d < what.head_dim; ++d) k.set(b, h, j, d, d % 2 ? NAN : INFINITY);
        for (int64_t d = 0; d < what.head_dim_v; ++d) v.set(b, h, j, d, d % 2 ? NAN : -INFINITY);
      }
    }
  }
}

void Instance::make_biases(Random& random) {
  const Case& c = what;
  const int64_t gap = c.layout == Layout::kGaps ? 3 : 0, columns = c.seqlen_k + gap,
                matrix = c.seqlen_q * columns;
  std::vector<int64_t> stride;
  if (c.bias == Bias::kFull) stride = {c.num_heads * matrix, matrix, columns, 1};
  if (c.bias == Bias::kPerHead) stride = {0, matrix, columns, 1};
  if (c.bias == Bias::kPerBatch) stride = {matrix, 0, columns, 1};
  if (c.bias == Bias::kPerKey) stride = {columns, 0, 0, 1};
  if (c.bias != Bias::kNone) {
    const std::vector<int64_t> shape = {c.batch, c.num_heads, c.seqlen_q, c.seqlen_k};
    bias = Array(c.bias_dtype, shape, stride, edge_);
    dbias = Array(FASTATTN_F32, shape, stride, edge_);
    bias.fill(random, 1.0);
  }
  const int64_t diagonals = c.seqlen_q + c.seqlen_k - 1;
  if (c.relative_bias) {
    relative_bias = Array(FASTATTN_F32, {1, c.num_heads, 1, diagonals}, {0, diagonals + gap, 0, 1}, edge_);
    drelative_bias = Array(FASTATTN_F32, {1, c.num_heads, 1, diagonals}, {0, diagonals + gap, 0, 1}, edge_);
    relative_bias.fill(random, 1.0);
  }
  if (c.alibi != 0) {
    alibi =
        Array(FASTATTN_F32, {c.batch, c.num_heads, 1, 1}, {c.alibi == 2 ? c.num_heads : 0, 1, 0, 0}, edge_);
    alibi.fill(random, 0.1);
  }
}

void Instance::describe_problem() {
  const Case& c = what;
  problem.struct_size = sizeof problem;
  problem.dtype = c.dtype;
  problem.batch = c.batch;
  problem.num_heads = c.num_heads;
  problem.num_kv_heads = c.num_kv_heads;
  problem.seqlen_q = c.seqlen_q;
  problem.seqlen_k = c.seqlen_k;
  problem.head_dim = c.head_dim;
  problem.head_dim_v = c.head_dim_v;
  problem.softmax_scale = c.softmax_scale;
  problem.softcap = c.softcap;
  problem.dropout_p = c.dropout_p;
  problem.dropout_seed = c.dropout_seed;
  problem.causal = c.causal;
  problem.window_left = c.window_left;
  problem.window_right = c.window_right;
  if (c.packed()) {
    problem.cu_seqlens_q = reinterpret_cast<int32_t*>(offsets_q_.data());
    problem.cu_seqlens_k = reinterpret_cast<int32_t*>(offsets_k_.data());
    problem.total_q = q.size(2);
    problem.total_k = k.size(2);
  }
  if (c.key_mask != KeyMask::kNone) problem.key_mask = key_mask.data();
  problem.key_mask_stride_b = key_mask_stride;
  problem.bias = bias_of(bias);
  problem.bias_dtype = c.bias_dtype;
  if (relative_bias.exists()) {
    problem.relative_bias = reinterpret_cast<float*>(relative_bias.data());
    problem.relative_bias_stride_h = relative_bias.stride(1);
  }
  if (alibi.exists()) {
    problem.alibi_slopes = reinterpret_cast<float*>(alibi.data());
    problem.alibi_stride_b = alibi.stride(0);
    problem.alibi_stride_h = alibi.stride(1);
  }
  problem.q = tensor_of(q);
  problem.k = tensor_of(k);
  problem.v = tensor_of(v);
}

void Instance::describe_results() {
  result.struct_size = sizeof result;
  result.out = tensor_of(out);
  result.lse = reinterpret_cast<float*>(lse.data());
  result.lse_stride_b = lse.stride(0);
  result.lse_stride_h = lse.stride(1);
  io.struct_size = sizeof io;
  io.out = tensor_of(out);
  io.dout = tensor_of(dout);
  io.lse = result.lse;
  io.lse_stride_b = lse.stride(0);
  io.lse_stride_h = lse.stride(1);
  if (dlse.exists()) {
    io.dlse = reinterpret_cast<float*>(dlse.data());
    io.dlse_stride_b = dlse.stride(0);
    io.dlse_stride_h = dlse.stride(1);
  }
  io.dq = tensor_of(dq, what.want_dq);
  io.dk = tensor_of(dk, what.want_dk);
  io.dv = tensor_of(dv, what.want_dv);
  io.dbias = bias_of(dbias, what.want_dbias);
  if (drelative_bias.exists() && what.want_drelative) {
    io.drelative_bias = reinterpret_cast<float*>(drelative_bias.data());
    io.drelative_bias_stride_h = drelative_bias.stride(1);
  }
}

// While the library runs, its inputs cannot be written.
void Instance::allow_writes(bool inputs, bool forward_results) {
  for (Array* array : {&q, &k, &v, &dout, &dlse, &bias, &relative_bias, &alibi})
    array->memory().allow_writes(inputs);
  key_mask.allow_writes(inputs), offsets_q_.allow_writes(inputs), offsets_k_.allow_writes(inputs);
  for (Array* array : {&out, &lse}) array->memory().allow_writes(forward_results);
}

fastattn_status Instance::forward(const fastattn_executor& executor) {
  out.memory().poison(), lse.memory().poison();
  allow_writes(false, true);
  const fastattn_status status = fastattn_cpu_forward(&problem, &result, &executor);
  allow_writes(true, true);
  return status;
}

fastattn_status Instance::backward(const fastattn_executor& executor) {
  for (Array* array : {&dq, &dk, &dv, &dbias, &drelative_bias}) array->memory().poison();
  allow_writes(false, false);
  const fastattn_status status = fastattn_cpu_backward(&problem, &io, &executor);
  allow_writes(true, true);
  return status;
}

fastattn_status Instance::forward(int threads) { return forward(fastattn_executor{nullptr, threads}); }
fastattn_status Instance::backward(int threads) { return backward(fastattn_executor{nullptr, threads}); }

}  // namespace fastattn_test
