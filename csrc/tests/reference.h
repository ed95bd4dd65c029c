// Attention in fp64 as its definition reads: no tiles, no online softmax, one loop for each index.
#pragma once

#include "case.h"

namespace fastattn_test {

// Whether dropout keeps the weight of query i and key j, from the definition in docs/architecture.md.
bool keeps(uint64_t seed, float dropout_p, int64_t b, int64_t h, int64_t i, int64_t j);

struct Reference {
  explicit Reference(const Instance& instance);
  void compute_backward();  // from the out that the instance holds, rounded as it is

  // The index of each is that of the Array it is compared with.
  std::vector<double> out, lse, dq, dk, dv, dbias, drelative_bias;

 private:
  double score(int64_t b, int64_t h, int64_t i, int64_t j, double* derivative) const;
  bool visible(int64_t b, int64_t i, int64_t j) const;
  void backward_row(int64_t b, int64_t h, int64_t i);

  const Instance& x_;
  std::vector<double> q_, k_, v_;  // with the offsets of x_.q, x_.k, x_.v
};

// The largest difference between an array and its reference, and the largest value of the latter;
// a NaN or an infinity where the reference has none counts as an infinite difference.
struct Difference {
  double largest = 0, scale = 0;
};
Difference compare(const Array& array, const std::vector<double>& reference);

}  // namespace fastattn_test
