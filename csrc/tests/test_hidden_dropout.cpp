// Dropout of hidden states: element by element the stream of common/philox.h, and nothing touched beyond.
#include <utility>
#include <vector>

#include "array.h"
#include "check.h"
#include "common/philox.h"

using namespace fastattn_test;

namespace {

fastattn_hidden_dropout io_of(const Array& x, const Array& out) {
  fastattn_hidden_dropout io = {};
  io.struct_size = sizeof io;
  io.dtype = x.dtype();
  io.x = x.data(), io.out = out.data();
  io.rows = x.size(2), io.columns = x.size(3);
  io.seqlen = 1;
  io.dropout_p = 0.3f;
  io.seed = 0x123456789ABCDEFull;
  return io;
}

Array rows_of(int dtype, int64_t rows, int64_t columns, Edge edge) {
  return Array(dtype, {1, 1, rows, columns}, {rows * columns, rows * columns, columns, 1}, edge);
}

void expect_stream(const fastattn_hidden_dropout& io, const Array& x, const Array& out,
                   const std::vector<std::pair<int64_t, int64_t>>& places) {
  const uint32_t threshold = fastattn::dropout_threshold(io.dropout_p);
  const double scale = fastattn::dropout_scale(io.dropout_p);
  for (int64_t r = 0; r < io.rows; ++r)
    for (int64_t c = 0; c < io.columns; ++c) {
      const auto [b, n] = places[(size_t)r];
      const bool kept = fastattn::dropout_keeps(io.seed, threshold, (uint32_t)b, 0, (uint32_t)n, (uint32_t)c);
      const double wanted = kept ? x.get(0, 0, r, c) * scale : 0.0, got = out.get(0, 0, r, c);
      const double rounding = io.dtype == FASTATTN_F32 ? 1e-6 : 1e-2;
      const double error = got > wanted ? got - wanted : wanted - got;
      CHECK(error <= rounding * (wanted > 0 ? wanted : -wanted), "row %lld column %lld: %g, not %g",
            (long long)r, (long long)c, got, wanted);
    }
}

TEST(hidden_dropout_numbers) {
  Random random(1);
  const std::vector<int32_t> offsets = {0, 3, 3, 11, 12};
  for (int dtype : {FASTATTN_F32, FASTATTN_F16, FASTATTN_BF16})
    for (int64_t columns : {1, 15, 128, 145})
      for (Edge edge : {Edge::kFront, Edge::kBack})
        for (bool packed : {false, true}) {
          say_current("dtype %d, %lld columns, %s", dtype, (long long)columns, packed ? "packed" : "padded");
          Array x = rows_of(dtype, 12, columns, edge), out = rows_of(dtype, 12, columns, edge);
          x.fill(random, 1.0);
          fastattn_hidden_dropout io = io_of(x, out);
          std::vector<std::pair<int64_t, int64_t>> places;
          if (packed) {
            io.batch = 4, io.cu_seqlens = offsets.data();
            for (int64_t b = 0; b < io.batch; ++b)
              for (int64_t n = 0; n < offsets[(size_t)b + 1] - offsets[(size_t)b]; ++n)
                places.push_back({b, n});
          } else {
            io.seqlen = 4;
            for (int64_t r = 0; r < io.rows; ++r) places.push_back({r / 4, r % 4});
          }
          x.memory().allow_writes(false);
          for (int threads : {1, 3}) {
            const fastattn_executor executor = {nullptr, threads};
            out.memory().poison();
            CHECK(fastattn_cpu_hidden_dropout(&io, &executor) == FASTATTN_OK, "%s", fastattn_last_error());
            expect_stream(io, x, out, places);
          }
        }
}

TEST(hidden_dropout_malformed) {
  Array x = rows_of(FASTATTN_F32, 6, 8, Edge::kBack), out = rows_of(FASTATTN_F32, 6, 8, Edge::kBack);
  const int32_t short_of[] = {0, 5}, beyond[] = {0, 7}, late[] = {1, 6}, falling[] = {0, 4, 3, 6};
  typedef void (*Spoil)(fastattn_hidden_dropout&);
  std::vector<fastattn_hidden_dropout> all;
  for (Spoil spoil : {Spoil([](fastattn_hidden_dropout& io) { io.struct_size = 8; }),
                      Spoil([](fastattn_hidden_dropout& io) { io.dtype = 3; }),
                      Spoil([](fastattn_hidden_dropout& io) { io.rows = -1; }),
                      Spoil([](fastattn_hidden_dropout& io) { io.columns = INT64_MAX; }),
                      Spoil([](fastattn_hidden_dropout& io) { io.seqlen = 0; }),
                      Spoil([](fastattn_hidden_dropout& io) { io.dropout_p = 1.0f; }),
                      Spoil([](fastattn_hidden_dropout& io) { io.reserved0 = 1; }),
                      Spoil([](fastattn_hidden_dropout& io) { io.x = nullptr; }),
                      Spoil([](fastattn_hidden_dropout& io) { io.out = nullptr; }),
                      Spoil([](fastattn_hidden_dropout& io) { io.out = (float*)io.x + 1; }),
                      Spoil([](fastattn_hidden_dropout& io) { io.x = (float*)io.out + 1; })}) {
    all.push_back(io_of(x, out));
    spoil(all.back());
  }
  for (const int32_t* offsets : {short_of, beyond, late, falling}) {
    all.push_back(io_of(x, out));
    all.back().cu_seqlens = offsets, all.back().batch = offsets == falling ? 3 : 1;
  }
  for (const fastattn_hidden_dropout& io : all) {
    say_current("case %d", (int)(&io - all.data()));
    CHECK(fastattn_cpu_hidden_dropout(&io, nullptr) == FASTATTN_INVALID_ARGUMENT, "not refused");
    bool untouched = true;
    for (size_t byte = 0; byte < out.memory_bytes(); ++byte) untouched &= out.data()[byte] == 0xff;
    CHECK(untouched, "the output was written");
  }
  CHECK(fastattn_cpu_hidden_dropout(nullptr, nullptr) == FASTATTN_INVALID_ARGUMENT, "not refused");
}

}  // namespace
