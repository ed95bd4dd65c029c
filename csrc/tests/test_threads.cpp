// The same bits for any number of threads and any way of handing out the work.
#include <unistd.h>

#include "case.h"
#include "check.h"

using namespace fastattn_test;

extern int random_cases;

namespace {

std::vector<uint8_t> results(const Case& c, const fastattn_executor& executor) {
  Instance x(c, Edge::kBack);
  std::vector<uint8_t> bytes;
  fastattn_status status = x.forward(executor);
  if (status == FASTATTN_OK) status = x.backward(executor);
  CHECK(status == FASTATTN_OK, "status %d, %s", status, fastattn_last_error());
  for (Array* array : {&x.out, &x.lse, &x.dq, &x.dk, &x.dv, &x.dbias, &x.drelative_bias})
    bytes.insert(bytes.end(), array->data(), array->data() + array->memory_bytes());
  return bytes;
}

// Foreign pools: one item a call in reverse order, and the whole range at once.
int32_t backwards(int64_t begin, int64_t end, int64_t, fastattn_range_fn fn, void* context) {
  for (int64_t i = end; i > begin; --i) fn(i - 1, i, context);
  return 0;
}
int32_t at_once(int64_t begin, int64_t end, int64_t, fastattn_range_fn fn, void* context) {
  if (begin < end) fn(begin, end, context);
  return 0;
}

void expect_same_bits(const Case& c) {
  say_current("%s", c.describe().c_str());
  const std::vector<uint8_t> alone = results(c, {nullptr, 1});
  CHECK(results(c, {nullptr, 1}) == alone, "a second call differs");
  for (int32_t threads : {2, 3, 8})
    CHECK(results(c, {nullptr, threads}) == alone, "%d threads differ from one", threads);
  CHECK(results(c, {backwards, 4}) == alone, "a pool that works backwards differs");
  CHECK(results(c, {at_once, 2}) == alone, "a pool that runs everything at once differs");
}

TEST(same_bits_for_every_number_of_threads) {
  Random random(77);
  for (int i = 0; i < random_cases / 3 + 5; ++i) expect_same_bits(random_case(random));
}

// Key tiles of a head that are units of their own add to dq, and to the diagonals of a relative bias, in
// turns: each waits for the one before, which must have been handed out before it. Where it was not, one
// thread waits for ever, and the alarm ends the run.
TEST(turns_at_dq_for_every_number_of_threads) {
  alarm(300);
  for (int dtype : {FASTATTN_F32, FASTATTN_BF16})
    for (int64_t batch : {2, 16})  // 8 kv heads that are divided by key tiles, and 64 that are not
      for (bool ragged : {false, true}) {
        Case c;
        c.dtype = dtype;
        c.batch = batch, c.num_heads = 4, c.num_kv_heads = 4;
        c.seqlen_q = 70, c.seqlen_k = batch == 2 ? 600 : 270;
        c.head_dim = 16, c.head_dim_v = 8;
        c.relative_bias = true;
        if (ragged) {
          for (int64_t b = 0; b < batch; ++b) {
            c.lengths_q.push_back(b % 3 == 0 ? 70 : 10);
            c.lengths_k.push_back(b % 2 == 0 ? c.seqlen_k : 100);
          }
          c.causal = true;
        } else {
          c.key_mask = KeyMask::kLeft;
        }
        expect_same_bits(c);
      }
  alarm(0);
}

TEST(a_sequence_does_not_depend_on_its_neighbours_in_the_batch) {
  for (auto [dtype, batch] : {std::pair{FASTATTN_F32, 3}, std::pair{FASTATTN_BF16, 3},
                              std::pair{FASTATTN_F32, 32}, std::pair{FASTATTN_BF16, 32}}) {
    Case all;
    all.dtype = dtype;
    all.batch = batch, all.num_heads = 4, all.num_kv_heads = 2;
    all.seqlen_q = batch == 3 ? 45 : 180, all.seqlen_k = 70;  // 180 in 32: units of 4 query tiles, not of 1
    Instance together(all, Edge::kBack);
    say_current("%s", all.describe().c_str());
    CHECK(together.forward(2) == FASTATTN_OK, "%s", fastattn_last_error());
    Case one = all;
    one.batch = 1;
    for (int64_t b = 0; b < all.batch; b += all.batch / 3) {
      Instance alone(one, Edge::kBack);
      for (auto [to, from] : {std::pair{&alone.q, &together.q}, std::pair{&alone.k, &together.k},
                              std::pair{&alone.v, &together.v}})
        to->for_each([&, to = to, from = from](int64_t, int64_t h, int64_t n, int64_t d) {
          to->set(0, h, n, d, from->get(b, h, n, d));
        });
      CHECK(alone.forward(1) == FASTATTN_OK, "%s", fastattn_last_error());
      int64_t different = 0;
      alone.out.for_each([&](int64_t, int64_t h, int64_t n, int64_t d) {
        different += alone.out.get(0, h, n, d) != together.out.get(b, h, n, d);
      });
      CHECK(different == 0, "sequence %d: %d elements differ", int(b), int(different));
    }
  }
}

}  // namespace
