// Rotary positions: the formula in double, on strided arrays between guard pages, and nothing touched beyond.
#include <cmath>
#include <vector>

#include "array.h"
#include "check.h"

using namespace fastattn_test;

namespace {

// (batch, heads, seqlen, head_dim), as a slice of a wider projection: heads side by side in a row, gaps
// behind.
Array heads_of(int dtype, int64_t batch, int64_t heads, int64_t seqlen, int64_t head_dim, Edge edge) {
  const int64_t row = heads * (head_dim + 1) + 3;
  return Array(dtype, {batch, heads, seqlen, head_dim}, {seqlen * row, head_dim + 1, row, 1}, edge);
}

struct Case {
  Array q, k, q_out, k_out, cos, sin;
  fastattn_rotary io = {};

  Case(int dtype, int table_dtype, bool broadcast, int64_t head_dim, int64_t rotary_dim, Edge edge) {
    const int64_t batch = 2, seqlen = 5, num_heads = 3, num_kv_heads = 1, pitch = rotary_dim + 2;
    q = heads_of(dtype, batch, num_heads, seqlen, head_dim, edge);
    k = heads_of(dtype, batch, num_kv_heads, seqlen, head_dim, edge);
    q_out = heads_of(dtype, batch, num_heads, seqlen, head_dim, edge);
    k_out = heads_of(dtype, batch, num_kv_heads, seqlen, head_dim, edge);
    const std::vector<int64_t> stride = {broadcast ? 0 : seqlen * pitch, 0, pitch, 1};
    cos = Array(table_dtype, {batch, 1, seqlen, rotary_dim}, stride, edge);
    sin = Array(table_dtype, {batch, 1, seqlen, rotary_dim}, stride, edge);
    io.struct_size = sizeof io;
    io.dtype = dtype, io.table_dtype = table_dtype;
    io.batch = batch, io.num_heads = num_heads, io.num_kv_heads = num_kv_heads, io.seqlen = seqlen;
    io.head_dim = head_dim, io.rotary_dim = rotary_dim;
    io.q = tensor_of(q), io.k = tensor_of(k), io.q_out = tensor_of(q_out), io.k_out = tensor_of(k_out);
    io.cos = cos.data(), io.cos_stride_b = cos.stride(0), io.cos_stride_n = cos.stride(2);
    io.sin = sin.data(), io.sin_stride_b = sin.stride(0), io.sin_stride_n = sin.stride(2);
  }
  static fastattn_tensor tensor_of(const Array& x) {
    return {x.data(), x.stride(0), x.stride(1), x.stride(2)};
  }
  void allow_writes(bool outputs_only) {
    for (Array* x : {&q, &k, &cos, &sin}) x->memory().allow_writes(!outputs_only);
  }
};

void expect_turned(const Case& c, const Array& x, const Array& out) {
  const int64_t half = c.io.rotary_dim / 2;
  const double rounding = c.io.dtype == FASTATTN_F32 ? 1e-6 : 1e-2;
  x.for_each([&](int64_t b, int64_t h, int64_t n, int64_t d) {
    const int64_t table_b = c.cos.stride(0) == 0 ? 0 : b;
    const auto cos = [&](int64_t i) { return c.cos.get(table_b, 0, n, i); };
    const auto sin = [&](int64_t i) { return c.sin.get(table_b, 0, n, i); };
    const double own = x.get(b, h, n, d);
    double wanted = own, size = std::fabs(own);
    if (d < 2 * half) {
      const bool low = d < half;
      const int64_t partner = low ? d + half : d - half;
      const double turn = (low ? -1.0 : 1.0) * x.get(b, h, n, partner);
      const double by = c.io.transposed ? -sin(partner) : sin(d);
      wanted = own * cos(d) + turn * by;
      size = std::fabs(own * cos(d)) + std::fabs(turn * by);
    }
    CHECK(std::fabs(out.get(b, h, n, d) - wanted) <= rounding * size, "(%lld, %lld, %lld, %lld): %g, not %g",
          (long long)b, (long long)h, (long long)n, (long long)d, out.get(b, h, n, d), wanted);
  });
  CHECK(out.touched_gaps() == 0, "%lld elements between the rows were written",
        (long long)out.touched_gaps());
}

TEST(rotary_numbers) {
  Random random(1);
  for (int dtype : {FASTATTN_F32, FASTATTN_F16, FASTATTN_BF16})
    for (int table_dtype : {(int)FASTATTN_F32, dtype})
      for (auto [head_dim, rotary_dim] :
           {std::pair<int64_t, int64_t>{2, 2}, {7, 4}, {16, 16}, {40, 34}, {64, 64}, {80, 32}, {256, 256}})
        for (Edge edge : {Edge::kFront, Edge::kBack})
          for (bool broadcast : {false, true}) {
            say_current("dtype %d, table %d, %lld of %lld", dtype, table_dtype, (long long)rotary_dim,
                        (long long)head_dim);
            Case c(dtype, table_dtype, broadcast, head_dim, rotary_dim, edge);
            for (Array* x : {&c.q, &c.k, &c.cos, &c.sin}) x->fill(random, 1.0);
            c.allow_writes(true);
            for (int transposed : {0, 1})
              for (int threads : {1, 3}) {
                c.io.transposed = transposed;
                const fastattn_executor executor = {nullptr, threads};
                c.q_out.memory().poison(), c.k_out.memory().poison();
                CHECK(fastattn_cpu_rotary(&c.io, &executor) == FASTATTN_OK, "%s", fastattn_last_error());
                expect_turned(c, c.q, c.q_out), expect_turned(c, c.k, c.k_out);
              }
          }
}

TEST(rotary_of_one_tensor) {
  Random random(2);
  Case c(FASTATTN_F32, FASTATTN_F32, true, 8, 8, Edge::kBack);
  for (Array* x : {&c.q, &c.cos, &c.sin}) x->fill(random, 1.0);
  c.io.num_kv_heads = 0, c.io.k = {}, c.io.k_out = {};
  CHECK(fastattn_cpu_rotary(&c.io, nullptr) == FASTATTN_OK, "%s", fastattn_last_error());
  expect_turned(c, c.q, c.q_out);
  c.io.seqlen = 0, c.io.q = {}, c.io.q_out = {}, c.io.cos = nullptr;
  CHECK(fastattn_cpu_rotary(&c.io, nullptr) == FASTATTN_OK, "%s", fastattn_last_error());
}

TEST(rotary_malformed) {
  Case c(FASTATTN_F16, FASTATTN_F32, false, 8, 6, Edge::kBack);
  typedef void (*Spoil)(fastattn_rotary&);
  int at = 0;
  for (Spoil spoil : {Spoil([](fastattn_rotary& io) { io.struct_size = 8; }),
                      Spoil([](fastattn_rotary& io) { io.dtype = 3; }),
                      Spoil([](fastattn_rotary& io) { io.table_dtype = FASTATTN_BF16; }),
                      Spoil([](fastattn_rotary& io) { io.transposed = 2; }),
                      Spoil([](fastattn_rotary& io) { io.batch = -1; }),
                      Spoil([](fastattn_rotary& io) { io.seqlen = INT64_C(1) << 31; }),
                      Spoil([](fastattn_rotary& io) { io.num_heads = 0; }),
                      Spoil([](fastattn_rotary& io) { io.num_kv_heads = -1; }),
                      Spoil([](fastattn_rotary& io) { io.head_dim = 257; }),
                      Spoil([](fastattn_rotary& io) { io.rotary_dim = 5; }),
                      Spoil([](fastattn_rotary& io) { io.rotary_dim = 10; }),
                      Spoil([](fastattn_rotary& io) { io.rotary_dim = 0; }),
                      Spoil([](fastattn_rotary& io) { io.q.data = nullptr; }),
                      Spoil([](fastattn_rotary& io) { io.k.data = nullptr; }),
                      Spoil([](fastattn_rotary& io) { io.k_out.data = nullptr; }),
                      Spoil([](fastattn_rotary& io) { io.cos = nullptr; }),
                      Spoil([](fastattn_rotary& io) { io.sin = nullptr; }),
                      Spoil([](fastattn_rotary& io) { io.q.stride_n = -1; }),
                      Spoil([](fastattn_rotary& io) { io.cos_stride_b = INT64_MAX / 2; }),
                      Spoil([](fastattn_rotary& io) { io.sin_stride_n = -1; }),
                      Spoil([](fastattn_rotary& io) { io.q_out.stride_h = io.head_dim - 1; }),
                      Spoil([](fastattn_rotary& io) { io.k_out = io.q_out; })}) {
    say_current("case %d", at++);
    fastattn_rotary io = c.io;
    spoil(io);
    CHECK(fastattn_cpu_rotary(&io, nullptr) == FASTATTN_INVALID_ARGUMENT, "not refused");
    bool untouched = true;
    for (Array* x : {&c.q_out, &c.k_out})
      for (size_t byte = 0; byte < x->memory_bytes(); ++byte) untouched &= x->data()[byte] == 0xff;
    CHECK(untouched, "an output was written");
  }
  CHECK(fastattn_cpu_rotary(nullptr, nullptr) == FASTATTN_INVALID_ARGUMENT, "not refused");
}

}  // namespace
