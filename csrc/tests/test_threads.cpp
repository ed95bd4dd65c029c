// The same bits for any number of threads and any way of handing out the work.
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

TEST(same_bits_for_every_number_of_threads) {
  Random random(77);
  for (int i = 0; i < random_cases / 3 + 5; ++i) {
    const Case c = random_case(random);
    say_current("%s", c.describe().c_str());
    const std::vector<uint8_t> alone = results(c, {nullptr, 1});
    CHECK(results(c, {nullptr, 1}) == alone, "a second call differs");
    for (int32_t threads : {2, 3, 8})
      CHECK(results(c, {nullptr, threads}) == alone, "%d threads differ from one", threads);
    CHECK(results(c, {backwards, 4}) == alone, "a pool that works backwards differs");
    CHECK(results(c, {at_once, 2}) == alone, "a pool that runs everything at once differs");
  }
}

TEST(a_sequence_does_not_depend_on_its_neighbours_in_the_batch) {
  for (int dtype : {FASTATTN_F32, FASTATTN_BF16}) {
    Case all;
    all.dtype = dtype;
    all.batch = 3, all.num_heads = 4, all.num_kv_heads = 2;
    all.seqlen_q = 45, all.seqlen_k = 70;
    Instance together(all, Edge::kBack);
    say_current("%s", all.describe().c_str());
    CHECK(together.forward(2) == FASTATTN_OK, "%s", fastattn_last_error());
    Case one = all;
    one.batch = 1;
    for (int64_t b = 0; b < all.batch; ++b) {
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
