// Forward and backward against the fp64 reference: every output between guard pages and poisoned
// before the call, every input read-only during it.
#include <cmath>
#include <utility>

#include "check.h"
#include "reference.h"

using namespace fastattn_test;

int random_cases = 150;  // set by main from FASTATTN_TEST_CASES

namespace {

// Differences allowed, relative to the largest element of the result (or to 1, the size of inputs): the
// rounding of the result itself, and that of the probabilities that a 16-bit product takes in.
double tolerance(int dtype) {
  const double kTolerances[] = {3e-5, 4e-3, 3e-2, 3e-2, 2e-4};  // by fastattn_dtype
  return kTolerances[dtype];
}

void expect_close(const char* name, const Array& got, const std::vector<double>& expected, double relative) {
  const Difference difference = compare(got, expected);
  const double allowed = relative * std::max(difference.scale, 1.0);
  CHECK(difference.largest <= allowed, "%s is off by %g, allowed %g (largest value %g)", name,
        difference.largest, allowed, difference.scale);
  const int64_t touched = got.touched_gaps();
  CHECK(touched == 0, "%s: %lld elements between its rows were written", name,
        static_cast<long long>(touched));
}

// The same call with its memory at the other end of the pages: the same bits.
void expect_same_bits_elsewhere(const Case& c, Instance& there) {
  say_current("%s edge=front", c.describe().c_str());
  Instance x(c, Edge::kFront);
  const bool ok = x.forward(2) == FASTATTN_OK && x.backward(2) == FASTATTN_OK;
  CHECK(ok, "%s", fastattn_last_error());
  auto expect_same = [](const char* name, const Array& left, const Array& right) {
    const bool same = left.memory_bytes() == 0 || memcmp(left.data(), right.data(), left.memory_bytes()) == 0;
    CHECK(same, "%s depends on where memory lies", name);
  };
  expect_same("out", x.out, there.out), expect_same("lse", x.lse, there.lse);
  expect_same("dq", x.dq, there.dq), expect_same("dk", x.dk, there.dk), expect_same("dv", x.dv, there.dv);
  expect_same("dbias", x.dbias, there.dbias);
  expect_same("drelative_bias", x.drelative_bias, there.drelative_bias);
}

void check_case(const Case& c) {
  say_current("%s", c.describe().c_str());
  Instance x(c, Edge::kBack);
  fastattn_status status = x.forward(2);
  CHECK(status == FASTATTN_OK, "forward: status %d, %s", status, fastattn_last_error());
  if (status != FASTATTN_OK) return;
  Reference reference(x);
  expect_close("out", x.out, reference.out, tolerance(c.dtype));
  expect_close("lse", x.lse, reference.lse, 3e-5);

  status = x.backward(2);
  CHECK(status == FASTATTN_OK, "backward: status %d, %s", status, fastattn_last_error());
  if (status != FASTATTN_OK) return;
  reference.compute_backward();
  const double relative = 2 * tolerance(c.dtype);
  if (c.want_dq) expect_close("dq", x.dq, reference.dq, relative);
  if (c.want_dk) expect_close("dk", x.dk, reference.dk, relative);
  if (c.want_dv) expect_close("dv", x.dv, reference.dv, relative);
  if (c.want_dbias && x.dbias.exists()) expect_close("dbias", x.dbias, reference.dbias, relative);
  if (c.want_drelative && x.drelative_bias.exists())
    expect_close("drelative_bias", x.drelative_bias, reference.drelative_bias, relative);
  expect_same_bits_elsewhere(c, x);
}

TEST(plain_shapes_in_every_dtype) {
  for (int dtype :
       {FASTATTN_F32, FASTATTN_F16, FASTATTN_BF16, FASTATTN_F32_BF16_PRODUCTS, FASTATTN_F32_SPLIT_PRODUCTS})
    for (int64_t n : {1, 5, 32, 63, 64, 65, 130})
      for (int64_t d : {31, 32, 64}) {
        Case c;
        c.dtype = dtype;
        c.seqlen_q = c.seqlen_k = n;
        c.head_dim = c.head_dim_v = d;
        c.softmax_scale = static_cast<float>(1 / std::sqrt(static_cast<double>(d)));
        check_case(c);
      }
}

TEST(random_problems_with_every_feature) {
  Random random(20240229);
  for (int i = 0; i < random_cases; ++i) check_case(random_case(random));
}

// The ways to divide a problem that sizes choose: by shape alone, so that small head dims do.
TEST(many_heads_and_several_key_tiles) {
  for (int dtype : {FASTATTN_F32, FASTATTN_BF16})
    for (bool masked : {false, true}) {
      Case c;
      c.dtype = dtype;
      c.batch = 16, c.num_heads = c.num_kv_heads = 4;  // whole heads are units, and sum dq for themselves
      c.seqlen_q = 66, c.seqlen_k = 270;
      c.head_dim = 8, c.head_dim_v = 3;
      c.causal = masked;
      c.key_mask = masked ? KeyMask::kHoles : KeyMask::kNone;
      check_case(c);
      c.batch = 2, c.seqlen_k = 520;  // key tiles are units, and take turns at dq
      c.head_dim = 64, c.head_dim_v = 32;
      check_case(c);
    }
}

TEST(units_of_many_query_tiles) {
  for (auto [dtype, nq] : {std::pair{FASTATTN_F32, 200}, std::pair{FASTATTN_BF16, 200},
                           std::pair{FASTATTN_BF16, 130}}) {  // 8 and 4 tiles a unit
    Case c;
    c.dtype = dtype;
    c.batch = 8, c.num_heads = 16, c.num_kv_heads = 4;
    c.seqlen_q = nq, c.seqlen_k = 260;
    c.head_dim = c.head_dim_v = 4;
    c.causal = dtype == FASTATTN_F32;
    c.want_dk = c.want_dv = false;  // the pass by queries has the same units
    check_case(c);
  }
}

TEST(decode_one_query_many_keys) {
  for (int dtype : {FASTATTN_F32, FASTATTN_BF16})
    for (bool causal : {false, true}) {
      Case c;
      c.dtype = dtype;
      c.batch = 1, c.num_heads = 4, c.num_kv_heads = 1;
      c.seqlen_q = 1, c.seqlen_k = 1025;
      c.head_dim = c.head_dim_v = 64;
      c.causal = causal;
      check_case(c);
    }
}

TEST(empty_sequences_and_no_keys) {
  for (int64_t nq : {0, 3})
    for (int64_t nk : {0, 3}) {
      Case c;
      c.seqlen_q = nq, c.seqlen_k = nk;
      check_case(c);
      c.lengths_q = {0, nq}, c.lengths_k = {nk, 0};
      check_case(c);
    }
  Case none;
  none.batch = 0;
  check_case(none);
}

// Scores of some thousands make each row all but one-hot. fp32 keeps them to about 1e-3, and weights with
// them.
TEST(huge_scores_neither_overflow_nor_become_nan) {
  for (int dtype : {FASTATTN_F32, FASTATTN_BF16}) {
    Case c;
    c.dtype = dtype;
    c.seqlen_q = 33, c.seqlen_k = 70;
    c.deviation = 30;
    c.softmax_scale = 4;
    Instance x(c, Edge::kBack);
    say_current("%s", c.describe().c_str());
    CHECK(x.forward(1) == FASTATTN_OK && x.backward(1) == FASTATTN_OK, "%s", fastattn_last_error());
    Reference reference(x);
    reference.compute_backward();
    const double relative = std::max(2e-3, tolerance(dtype));
    expect_close("out", x.out, reference.out, relative);
    expect_close("lse", x.lse, reference.lse, 1e-6);
    expect_close("dq", x.dq, reference.dq, relative);
    expect_close("dk", x.dk, reference.dk, relative);
    expect_close("dv", x.dv, reference.dv, relative);
  }
}

TEST(lse_is_optional) {
  Case c;
  Instance with(c, Edge::kBack), without(c, Edge::kBack);
  without.result.lse = nullptr;
  say_current("%s", c.describe().c_str());
  CHECK(with.forward(1) == FASTATTN_OK && without.forward(1) == FASTATTN_OK, "%s", fastattn_last_error());
  CHECK(memcmp(with.out.data(), without.out.data(), with.out.memory_bytes()) == 0, "out depends on lse");
}

TEST(dropout_mask_is_the_documented_function) {
  const int64_t batch = 2, heads = 3, nq = 5, nk = 300;
  for (float p : {0.0f, 0.1f, 0.5f, 0.9f})
    for (uint64_t seed : {uint64_t{0}, uint64_t{1} << 32, uint64_t{0x123456789abcdef0}}) {
      say_current("p=%g seed=%llu", p, static_cast<unsigned long long>(seed));
      GuardedMemory keep(static_cast<size_t>(batch * heads * nq * nk), Edge::kBack);
      const fastattn_status status = fastattn_cpu_dropout_mask(seed, p, batch, heads, nq, nk, keep.data());
      CHECK(status == FASTATTN_OK, "%s", fastattn_last_error());
      int64_t wrong = 0, at = 0;
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t h = 0; h < heads; ++h)
          for (int64_t i = 0; i < nq; ++i)
            for (int64_t j = 0; j < nk; ++j, ++at)
              wrong += keep.data()[at] != (keeps(seed, p, b, h, i, j) ? 1 : 0);
      CHECK(wrong == 0, "%lld of %lld weights", static_cast<long long>(wrong), static_cast<long long>(at));
    }
}

}  // namespace
