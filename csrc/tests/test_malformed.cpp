// A malformed problem comes back as a status with a sentence, before anything is read or written.
#include <cmath>
#include <functional>
#include <limits>

#include "case.h"
#include "check.h"

using namespace fastattn_test;

namespace {

using Spoil = std::function<void(Instance&)>;

void expect_refused(const char* what, const Case& c, const Spoil& spoil, bool in_forward = true) {
  say_current("%s", what);
  Instance x(c, Edge::kBack);
  if (!in_forward) CHECK(x.forward(1) == FASTATTN_OK, "%s", fastattn_last_error());
  spoil(x);
  const fastattn_status status = in_forward ? x.forward(1) : x.backward(1);
  CHECK(status == FASTATTN_INVALID_ARGUMENT || status == FASTATTN_UNSUPPORTED, "status %d", status);
  CHECK(fastattn_last_error() != nullptr && strlen(fastattn_last_error()) > 10, "no sentence");
  for (Array* array : {&x.out, &x.lse, &x.dq, &x.dk, &x.dv, &x.dbias, &x.drelative_bias})
    if (in_forward || (array != &x.out && array != &x.lse))
      for (size_t byte = 0; byte < array->memory_bytes(); ++byte)
        if (array->data()[byte] != 0xff) {
          CHECK(false, "an output was written");
          return;
        }
}

Case packed_case() {
  Case c;
  c.lengths_q = {5, 7}, c.lengths_k = {5, 7};
  c.seqlen_q = c.seqlen_k = 7;
  return c;
}

Case every_input() {
  Case c;
  c.key_mask = KeyMask::kRight;
  c.bias = Bias::kFull;
  c.relative_bias = true;
  c.alibi = 2;
  return c;
}

TEST(scalars_out_of_range) {
  const int64_t huge = std::numeric_limits<int64_t>::max();
  const float nan = std::numeric_limits<float>::quiet_NaN(),
              infinity = std::numeric_limits<float>::infinity();
  const std::pair<const char*, Spoil> all[] = {
      {"struct_size 0", [](Instance& x) { x.problem.struct_size = 0; }},
      {"struct_size too small", [](Instance& x) { x.problem.struct_size -= 8; }},
      {"struct_size of the result", [](Instance& x) { x.result.struct_size = 4; }},
      {"reserved0", [](Instance& x) { x.problem.reserved0 = 1; }},
      {"reserved0 of the result", [](Instance& x) { x.result.reserved0 = 1; }},
      {"dtype 5", [](Instance& x) { x.problem.dtype = 5; }},
      {"dtype -1", [](Instance& x) { x.problem.dtype = -1; }},
      {"batch -1", [](Instance& x) { x.problem.batch = -1; }},
      {"batch huge", [=](Instance& x) { x.problem.batch = huge; }},
      {"num_heads 0", [](Instance& x) { x.problem.num_heads = 0; }},
      {"num_heads -2", [](Instance& x) { x.problem.num_heads = -2; }},
      {"num_heads not a multiple", [](Instance& x) { x.problem.num_heads = 3; }},
      {"num_kv_heads 0", [](Instance& x) { x.problem.num_kv_heads = 0; }},
      {"num_kv_heads -1", [](Instance& x) { x.problem.num_kv_heads = -1; }},
      {"seqlen_q -1", [](Instance& x) { x.problem.seqlen_q = -1; }},
      {"seqlen_k -1", [](Instance& x) { x.problem.seqlen_k = -1; }},
      {"seqlen_q huge", [=](Instance& x) { x.problem.seqlen_q = huge; }},
      {"seqlen_k huge", [=](Instance& x) { x.problem.seqlen_k = huge; }},
      {"head_dim 0", [](Instance& x) { x.problem.head_dim = 0; }},
      {"head_dim 257", [](Instance& x) { x.problem.head_dim = 257; }},
      {"head_dim -16", [](Instance& x) { x.problem.head_dim = -16; }},
      {"head_dim_v 0", [](Instance& x) { x.problem.head_dim_v = 0; }},
      {"head_dim_v huge", [=](Instance& x) { x.problem.head_dim_v = huge; }},
      {"softmax_scale NaN", [=](Instance& x) { x.problem.softmax_scale = nan; }},
      {"softmax_scale inf", [=](Instance& x) { x.problem.softmax_scale = infinity; }},
      {"softcap negative", [](Instance& x) { x.problem.softcap = -1; }},
      {"softcap NaN", [=](Instance& x) { x.problem.softcap = nan; }},
      {"dropout_p negative", [](Instance& x) { x.problem.dropout_p = -0.1f; }},
      {"dropout_p 1", [](Instance& x) { x.problem.dropout_p = 1; }},
      {"dropout_p NaN", [=](Instance& x) { x.problem.dropout_p = nan; }},
      {"window_left -2", [](Instance& x) { x.problem.window_left = -2; }},
      {"window_right -2", [](Instance& x) { x.problem.window_right = -2; }},
  };
  for (const auto& [what, spoil] : all) expect_refused(what, Case{}, spoil);
}

TEST(pointers_that_are_missing) {
  const std::pair<const char*, Spoil> all[] = {
      {"q", [](Instance& x) { x.problem.q.data = nullptr; }},
      {"k", [](Instance& x) { x.problem.k.data = nullptr; }},
      {"v", [](Instance& x) { x.problem.v.data = nullptr; }},
      {"out", [](Instance& x) { x.result.out.data = nullptr; }},
  };
  for (const auto& [what, spoil] : all) expect_refused(what, Case{}, spoil);
  const std::pair<const char*, Spoil> backward[] = {
      {"backward: out", [](Instance& x) { x.io.out.data = nullptr; }},
      {"backward: dout", [](Instance& x) { x.io.dout.data = nullptr; }},
      {"backward: lse", [](Instance& x) { x.io.lse = nullptr; }},
      {"backward: dbias without bias", [](Instance& x) { x.io.dbias.data = x.dq.data(); }},
      {"backward: drelative_bias without relative_bias",
       [](Instance& x) { x.io.drelative_bias = reinterpret_cast<float*>(x.dq.data()); }},
      {"backward: struct_size", [](Instance& x) { x.io.struct_size = 1; }},
      {"backward: reserved0", [](Instance& x) { x.io.reserved0 = 1; }},
  };
  for (const auto& [what, spoil] : backward) expect_refused(what, Case{}, spoil, false);

  say_current("null structs");
  Instance x(Case{}, Edge::kBack);
  const fastattn_executor executor = {nullptr, 1};
  CHECK(fastattn_cpu_forward(nullptr, &x.result, &executor) == FASTATTN_INVALID_ARGUMENT, "null problem");
  CHECK(fastattn_cpu_forward(&x.problem, nullptr, &executor) == FASTATTN_INVALID_ARGUMENT, "null result");
  CHECK(fastattn_cpu_backward(nullptr, &x.io, &executor) == FASTATTN_INVALID_ARGUMENT, "null problem");
  CHECK(fastattn_cpu_backward(&x.problem, nullptr, &executor) == FASTATTN_INVALID_ARGUMENT, "null io");

  for (int threads : {0, -1}) {
    say_current("%d threads", threads);
    CHECK(x.forward(threads) == FASTATTN_INVALID_ARGUMENT, "forward");
    CHECK(x.backward(threads) == FASTATTN_INVALID_ARGUMENT, "backward");
  }
}

TEST(dropout_masks_of_no_size) {
  uint8_t keep[1];
  const int64_t huge = INT64_C(1) << 40, large = (INT64_C(1) << 31) - 1;
  const int64_t sizes[][4] = {
      {-1, 1, 1, 1}, {1, -1, 1, 1}, {1, 1, huge, 0}, {huge, 1, 1, 0}, {large, large, large, 1}};
  for (const auto& n : sizes) {
    say_current("%lld x %lld x %lld x %lld", (long long)n[0], (long long)n[1], (long long)n[2],
                (long long)n[3]);
    CHECK(fastattn_cpu_dropout_mask(0, 0.5f, n[0], n[1], n[2], n[3], keep) == FASTATTN_INVALID_ARGUMENT,
          "accepted");
  }
  say_current("no memory");
  CHECK(fastattn_cpu_dropout_mask(0, 0.5f, 1, 1, 1, 1, nullptr) == FASTATTN_INVALID_ARGUMENT, "accepted");
  CHECK(fastattn_cpu_dropout_mask(0, 1.0f, 1, 1, 1, 1, keep) == FASTATTN_INVALID_ARGUMENT, "p = 1 accepted");
  CHECK(fastattn_cpu_dropout_mask(0, 0.5f, large, 1, large, 0, nullptr) == FASTATTN_OK, "nothing to write");
}

TEST(packed_offsets_that_lie) {
  const std::pair<const char*, std::function<void(Instance&, int32_t*)>> all[] = {
      {"descending", [](Instance& x, int32_t* o) { o[1] = 12, o[2] = 5, x.problem.cu_seqlens_q = o; }},
      {"negative", [](Instance& x, int32_t* o) { o[0] = -3, x.problem.cu_seqlens_q = o; }},
      {"beyond total_q", [](Instance& x, int32_t* o) { o[2] = 1000, x.problem.cu_seqlens_q = o; }},
      {"beyond total_k", [](Instance& x, int32_t* o) { o[2] = 13, x.problem.cu_seqlens_k = o; }},
      {"total_q too small", [](Instance& x, int32_t*) { x.problem.total_q = 11; }},
      {"total_k negative", [](Instance& x, int32_t*) { x.problem.total_k = -1; }},
      {"seqlen_q below the longest", [](Instance& x, int32_t*) { x.problem.seqlen_q = 6; }},
      {"seqlen_k below the longest", [](Instance& x, int32_t*) { x.problem.seqlen_k = 6; }},
      {"only cu_seqlens_q", [](Instance& x, int32_t*) { x.problem.cu_seqlens_k = nullptr; }},
      {"only cu_seqlens_k", [](Instance& x, int32_t*) { x.problem.cu_seqlens_q = nullptr; }},
  };
  for (const auto& [what, spoil] : all) {
    int32_t offsets[3] = {0, 5, 12};
    expect_refused(what, packed_case(), [&, spoil = spoil](Instance& x) { spoil(x, offsets); });
  }
  expect_refused("a key mask beside packed sequences", packed_case(), [](Instance& x) {
    static const uint8_t mask[14] = {};
    x.problem.key_mask = mask, x.problem.key_mask_stride_b = 7;
  });
}

TEST(strides_that_overlap_or_overflow) {
  const int64_t huge = std::numeric_limits<int64_t>::max() / 2;
  const std::pair<const char*, Spoil> all[] = {
      {"out broadcast over heads", [](Instance& x) { x.result.out.stride_h = 0; }},
      {"out broadcast over rows", [](Instance& x) { x.result.out.stride_n = 0; }},
      {"q stride overflows", [=](Instance& x) { x.problem.q.stride_h = huge; }},
      {"k stride overflows", [=](Instance& x) { x.problem.k.stride_n = huge; }},
      {"out stride overflows", [=](Instance& x) { x.result.out.stride_b = huge; }},
      {"bias dtype", [](Instance& x) { x.problem.bias.data = x.q.data(), x.problem.bias_dtype = 9; }},
      {"out: a head begins inside another", [](Instance& x) { x.result.out.stride_h -= 1; }},
      {"lse broadcast over heads", [](Instance& x) { x.result.lse_stride_h = 0; }},
      {"lse in out", [](Instance& x) { x.result.lse = reinterpret_cast<float*>(x.result.out.data) + 3; }},
      {"key_mask stride", [=](Instance& x) { x.problem.key_mask_stride_b = huge; }},
      {"key_mask stride negative", [](Instance& x) { x.problem.key_mask_stride_b = -1; }},
      {"alibi stride", [=](Instance& x) { x.problem.alibi_stride_h = huge; }},
      {"alibi stride negative", [](Instance& x) { x.problem.alibi_stride_b = -1; }},
      {"relative_bias stride", [=](Instance& x) { x.problem.relative_bias_stride_h = huge; }},
      {"relative_bias stride negative", [](Instance& x) { x.problem.relative_bias_stride_h = -1; }},
      {"bias stride", [=](Instance& x) { x.problem.bias.stride_k = huge; }},
      {"bias stride negative", [](Instance& x) { x.problem.bias.stride_b = -1; }},
  };
  for (const auto& [what, spoil] : all) expect_refused(what, every_input(), spoil);
}

TEST(gradients_that_overlap) {
  const std::pair<const char*, Spoil> all[] = {
      {"dq is dk", [](Instance& x) { x.io.dk = x.io.dq; }},
      {"dv is dk", [](Instance& x) { x.io.dv = x.io.dk; }},
      {"dk begins inside dq",
       [](Instance& x) { x.io.dk.data = reinterpret_cast<float*>(x.io.dq.data) + x.io.dq.stride_h; }},
      {"dq begins inside dv",
       [](Instance& x) { x.io.dq.data = reinterpret_cast<float*>(x.io.dv.data) + x.io.dv.stride_n + 1; }},
      {"dk: rows overlap", [](Instance& x) { x.io.dk.stride_n -= 1; }},
      {"dk: heads overlap", [](Instance& x) { x.io.dk.stride_h = x.io.dk.stride_n; }},
      {"dbias: rows overlap", [](Instance& x) { x.io.dbias.stride_q = 1; }},
      {"dbias: heads overlap", [](Instance& x) { x.io.dbias.stride_h -= 1; }},
      {"dbias: stride negative", [](Instance& x) { x.io.dbias.stride_h = -1; }},
      {"dbias in dq", [](Instance& x) { x.io.dbias.data = x.io.dq.data; }},
      {"drelative_bias: rows overlap", [](Instance& x) { x.io.drelative_bias_stride_h -= 1; }},
      {"drelative_bias in dbias",
       [](Instance& x) { x.io.drelative_bias = reinterpret_cast<float*>(x.io.dbias.data) + 7; }},
  };
  for (const auto& [what, spoil] : all) expect_refused(what, every_input(), spoil, false);

  say_current("gradients interleaved in one array");
  Case c;
  c.seqlen_k = c.seqlen_q;
  Instance x(c, Edge::kBack), apart(c, Edge::kBack);
  const int64_t columns = c.head_dim, row = 3 * c.num_heads * columns;
  Array packed(FASTATTN_F32, {1, c.batch, c.seqlen_q, row}, {0, c.seqlen_q * row, row, 1}, Edge::kBack);
  fastattn_tensor* const gradients[] = {&x.io.dq, &x.io.dk, &x.io.dv};
  for (int i = 0; i < 3; ++i)
    *gradients[i] = {packed.data() + i * c.num_heads * columns * 4, c.seqlen_q * row, columns, row};
  CHECK(x.forward(1) == FASTATTN_OK && x.backward(1) == FASTATTN_OK, "%s", fastattn_last_error());
  CHECK(apart.forward(1) == FASTATTN_OK && apart.backward(1) == FASTATTN_OK, "%s", fastattn_last_error());
  int64_t different = 0;
  apart.dk.for_each([&](int64_t b, int64_t h, int64_t n, int64_t d) {
    different += packed.get(0, b, n, (c.num_heads + h) * columns + d) != apart.dk.get(b, h, n, d);
  });
  CHECK(different == 0, "%lld elements of dk differ", static_cast<long long>(different));
}

TEST(errors_belong_to_their_thread_and_name_the_argument) {
  say_current("head_dim 300");
  Instance x(Case{}, Edge::kBack);
  x.problem.head_dim = 300;
  CHECK(x.forward(1) == FASTATTN_INVALID_ARGUMENT || x.forward(1) == FASTATTN_UNSUPPORTED, "accepted");
  const std::string sentence = fastattn_last_error();
  CHECK(sentence.find("head_dim") != std::string::npos, "no argument is named in: %s", sentence.c_str());
  CHECK(sentence.find("300") != std::string::npos, "no value is named in: %s", sentence.c_str());
}

TEST(abi_version_and_names) {
  say_current("constants");
  CHECK(fastattn_abi_version() == FASTATTN_ABI_VERSION, "%d", fastattn_abi_version());
  const std::string all = std::string(",") + fastattn_cpu_isas() + ",", used = fastattn_cpu_isa();
  CHECK(all.find("," + used + ",") != std::string::npos, "%s is none of %s", used.c_str(), all.c_str());
  const char* const forced = getenv("FASTATTN_CPU_ISA");
  CHECK(forced == nullptr || used == forced, "FASTATTN_CPU_ISA=%s, in use: %s", forced, used.c_str());
}

}  // namespace
