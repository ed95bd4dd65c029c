// Linear layers: the product in double, on strided arrays between guard pages, the same bits for any threads.
#include <cmath>
#include <vector>

#include "array.h"
#include "check.h"

using namespace fastattn_test;

namespace {

Array matrix(int64_t rows, int64_t columns, Edge edge) {
  return Array(FASTATTN_F32, {1, 1, rows, columns}, {0, 0, columns + 3, 1}, edge);
}

struct Case {
  Array x, weight, bias, out;
  fastattn_linear io = {};

  Case(int64_t rows, int64_t in_features, int64_t out_features, bool transposed, Edge edge) {
    x = matrix(rows, in_features, edge), out = matrix(rows, out_features, edge);
    weight = transposed ? matrix(in_features, out_features, edge) : matrix(out_features, in_features, edge);
    bias = matrix(1, out_features, edge);
    io.struct_size = sizeof io;
    io.transposed = transposed;
    io.rows = rows, io.in_features = in_features, io.out_features = out_features;
    io.x = (const float*)x.data(), io.stride_x = x.stride(2);
    io.weight = (const float*)weight.data(), io.stride_weight = weight.stride(2);
    io.bias = (const float*)bias.data();
    io.out = (float*)out.data(), io.stride_out = out.stride(2);
  }
  void expect_product() const {
    out.for_each([&](int64_t, int64_t, int64_t n, int64_t column) {
      double wanted = io.bias != nullptr ? bias.get(0, 0, 0, column) : 0.0, size = std::fabs(wanted);
      for (int64_t k = 0; k < io.in_features; ++k) {
        const double w = io.transposed != 0 ? weight.get(0, 0, k, column) : weight.get(0, 0, column, k);
        const double term = x.get(0, 0, n, k) * w;
        wanted += term, size += std::fabs(term);
      }
      if (io.gelu != 0) wanted *= 0.5 * std::erfc(-wanted / std::sqrt(2.0));
      const double got = out.get(0, 0, n, column);
      CHECK(std::fabs(got - wanted) <= 4e-7 * (1.0 + size), "(%lld, %lld): %g, not %g", (long long)n,
            (long long)column, got, wanted);
    });
    CHECK(out.touched_gaps() == 0, "%lld elements between the rows were written",
          (long long)out.touched_gaps());
  }
};

TEST(linear_numbers) {
  struct Sizes {
    int64_t rows, in_features, out_features;
  };
  Random random(1);
  for (const Sizes& s :
       {Sizes{1, 1, 16}, {5, 7, 48}, {7, 16, 64}, {13, 33, 80}, {200, 40, 272}, {9, 500, 96}})
    for (Edge edge : {Edge::kFront, Edge::kBack})
      for (bool transposed : {false, true}) {
        Case c(s.rows, s.in_features, s.out_features, transposed, edge);
        for (Array* x : {&c.x, &c.weight, &c.bias}) {
          x->fill(random, 1.0);
          x->memory().allow_writes(false);
        }
        const float* const bias = c.io.bias;
        for (int gelu : {0, 1})
          for (bool has_bias : {false, true}) {
            say_current("%lld x %lld to %lld, transposed %d, gelu %d, bias %d", (long long)s.rows,
                        (long long)s.in_features, (long long)s.out_features, transposed, gelu, has_bias);
            c.io.gelu = gelu, c.io.bias = has_bias ? bias : nullptr;
            std::vector<double> alone;
            for (int threads : {1, 3}) {
              const fastattn_executor executor = {nullptr, threads};
              c.out.memory().poison();
              CHECK(fastattn_cpu_linear(&c.io, &executor) == FASTATTN_OK, "%s", fastattn_last_error());
              c.expect_product();
              if (threads == 1) alone = c.out.values();
              const std::vector<double> now = c.out.values();
              for (size_t i = 0; i < now.size(); ++i)
                CHECK(now[i] == alone[i] || std::isnan(now[i]), "%zu differs with %d threads", i, threads);
            }
          }
      }
}

TEST(linear_gelu_at_the_ends) {
  Case c(1, 1, 16, false, Edge::kBack);
  const double values[] = {0.0,  -0.0,  1e-30, -1e-30, 1.0,  -1.0,  5.19, -5.19,
                           5.21, -5.21, 20.0,  -20.0,  1e30, -1e30, NAN,  INFINITY};
  c.x.set(0, 0, 0, 0, 1.0);
  for (int i = 0; i < 16; ++i) c.weight.set(0, 0, i, 0, values[i]);
  c.io.gelu = 1, c.io.bias = nullptr;
  CHECK(fastattn_cpu_linear(&c.io, nullptr) == FASTATTN_OK, "%s", fastattn_last_error());
  for (int i = 0; i < 16; ++i) {
    const double x = values[i], got = c.out.get(0, 0, 0, i);
    say_current("gelu of %g", x);
    if (std::isnan(x)) {
      CHECK(std::isnan(got), "%g", got);
    } else {
      const double wanted = x < -30.0 ? 0.0 : x * 0.5 * std::erfc(-x / std::sqrt(2.0));
      CHECK(got == wanted || std::fabs(got - wanted) <= 1e-6 + 1e-6 * std::fabs(wanted), "%g, not %g", got,
            wanted);
    }
  }
}

TEST(linear_of_nothing) {
  fastattn_linear io = {};
  io.struct_size = sizeof io;
  io.in_features = 3, io.out_features = 16;
  CHECK(fastattn_cpu_linear(&io, nullptr) == FASTATTN_OK, "%s", fastattn_last_error());
}

TEST(linear_malformed) {
  Case c(4, 8, 16, false, Edge::kBack);
  typedef void (*Spoil)(fastattn_linear&);
  int at = 0;
  for (Spoil spoil : {Spoil([](fastattn_linear& io) { io.struct_size = 8; }),
                      Spoil([](fastattn_linear& io) { io.transposed = 2; }),
                      Spoil([](fastattn_linear& io) { io.gelu = -1; }),
                      Spoil([](fastattn_linear& io) { io.reserved0 = 1; }),
                      Spoil([](fastattn_linear& io) { io.rows = -1; }),
                      Spoil([](fastattn_linear& io) { io.rows = INT64_C(1) << 31; }),
                      Spoil([](fastattn_linear& io) { io.in_features = 0; }),
                      Spoil([](fastattn_linear& io) { io.out_features = 24; }),
                      Spoil([](fastattn_linear& io) { io.out_features = 0; }),
                      Spoil([](fastattn_linear& io) { io.x = nullptr; }),
                      Spoil([](fastattn_linear& io) { io.weight = nullptr; }),
                      Spoil([](fastattn_linear& io) { io.out = nullptr; }),
                      Spoil([](fastattn_linear& io) { io.stride_x = -1; }),
                      Spoil([](fastattn_linear& io) { io.stride_weight = INT64_MAX / 2; }),
                      Spoil([](fastattn_linear& io) { io.stride_out = io.out_features - 1; })}) {
    say_current("case %d", at++);
    fastattn_linear io = c.io;
    spoil(io);
    CHECK(fastattn_cpu_linear(&io, nullptr) == FASTATTN_INVALID_ARGUMENT, "not refused");
    bool untouched = true;
    for (size_t byte = 0; byte < c.out.memory_bytes(); ++byte) untouched &= c.out.data()[byte] == 0xff;
    CHECK(untouched, "the output was written");
  }
  CHECK(fastattn_cpu_linear(nullptr, nullptr) == FASTATTN_INVALID_ARGUMENT, "not refused");
}

}  // namespace
