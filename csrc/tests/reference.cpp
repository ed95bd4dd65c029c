#include "reference.h"

#include <algorithm>
#include <cmath>

namespace fastattn_test {
namespace {

size_t elements(const Array& array) {
  return array.exists() ? array.memory_bytes() / size_of(array.dtype()) : 0;
}

}  // namespace

bool keeps(uint64_t seed, float dropout_p, int64_t b, int64_t h, int64_t i, int64_t j) {
  if (dropout_p == 0) return true;
  uint32_t c[4] = {static_cast<uint32_t>(i), static_cast<uint32_t>(j / 128 * 16 + j % 16),
                   static_cast<uint32_t>(h), static_cast<uint32_t>(b)};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 7; ++round) {
    const uint64_t first = uint64_t{0xD2511F53} * c[0], second = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {
        static_cast<uint32_t>(second >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(second),
        static_cast<uint32_t>(first >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(first)};
    std::copy(next, next + 4, c);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  const int64_t slot = j / 16 % 8;
  const uint32_t half = slot % 2 == 0 ? c[slot / 2] & 0xffff : c[slot / 2] >> 16;
  return half >= static_cast<uint32_t>(std::lround(static_cast<double>(dropout_p) * 65536));
}

bool Reference::visible(int64_t b, int64_t i, int64_t j) const {
  const Case& c = x_.what;
  const int64_t diagonal = i + x_.length_k(b) - x_.length_q(b);
  if (c.causal && j > diagonal) return false;
  if (c.window_left >= 0 && j < diagonal - c.window_left) return false;
  if (c.window_right >= 0 && j > diagonal + c.window_right) return false;
  return x_.key_visible(b, j);
}

double Reference::score(int64_t b, int64_t h, int64_t i, int64_t j, double* derivative) const {
  const Case& c = x_.what;
  const int64_t kv_head = h / (c.num_heads / c.num_kv_heads);
  const double* const query = &q_[x_.q.offset(x_.sequence(b), h, x_.row_q(b, i), 0)];
  const double* const key = &k_[x_.k.offset(x_.sequence(b), kv_head, x_.row_k(b, j), 0)];
  double s = 0;
  for (int64_t d = 0; d < c.head_dim; ++d) s += query[d] * key[d];
  s *= c.softmax_scale;
  *derivative = 1;
  if (c.softcap > 0) {
    const double bent = std::tanh(s / c.softcap);
    s = c.softcap * bent;
    *derivative = 1 - bent * bent;
  }
  if (x_.bias.exists()) s += x_.bias.get(b, h, i, j);
  if (x_.relative_bias.exists()) s += x_.relative_bias.get(0, h, 0, j - i + c.seqlen_q - 1);
  if (x_.alibi.exists())
    s -= x_.alibi.get(b, h, 0, 0) * std::fabs(static_cast<double>(i + x_.length_k(b) - x_.length_q(b) - j));
  return s;
}

Reference::Reference(const Instance& instance)
    : x_(instance), q_(x_.q.values()), k_(x_.k.values()), v_(x_.v.values()) {
  const Case& c = x_.what;
  out.assign(elements(x_.out), 0);
  lse.assign(elements(x_.lse), -INFINITY);
  const double rescale = 65536.0 / (65536.0 - std::lround(static_cast<double>(c.dropout_p) * 65536));
  double unused;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.num_heads; ++h)
      for (int64_t i = 0; i < x_.length_q(b); ++i) {
        const int64_t length = x_.length_k(b), kv_head = h / (c.num_heads / c.num_kv_heads);
        std::vector<double> scores(static_cast<size_t>(length), -INFINITY);
        double largest = -INFINITY, sum = 0;
        for (int64_t j = 0; j < length; ++j)
          if (visible(b, i, j)) largest = std::max(largest, scores[j] = score(b, h, i, j, &unused));
        if (largest == -INFINITY) continue;
        for (double s : scores) sum += std::exp(s - largest);
        const double log_sum = largest + std::log(sum);
        lse[x_.lse.offset(x_.sequence(b), h, x_.row_q(b, i), 0)] = log_sum;
        for (int64_t j = 0; j < length; ++j) {
          if (scores[j] == -INFINITY || !keeps(c.dropout_seed, c.dropout_p, b, h, i, j)) continue;
          const double weight = std::exp(scores[j] - log_sum) * rescale;
          const double* const value = &v_[x_.v.offset(x_.sequence(b), kv_head, x_.row_k(b, j), 0)];
          double* const sum_of_values = &out[x_.out.offset(x_.sequence(b), h, x_.row_q(b, i), 0)];
          for (int64_t d = 0; d < c.head_dim_v; ++d) sum_of_values[d] += weight * value[d];
        }
      }
}

void Reference::compute_backward() {
  const Case& c = x_.what;
  dq.assign(elements(x_.dq), 0), dk.assign(elements(x_.dk), 0), dv.assign(elements(x_.dv), 0);
  dbias.assign(elements(x_.dbias), 0), drelative_bias.assign(elements(x_.drelative_bias), 0);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.num_heads; ++h)
      for (int64_t i = 0; i < x_.length_q(b); ++i) backward_row(b, h, i);
}

void Reference::backward_row(int64_t b, int64_t h, int64_t i) {
  const Case& c = x_.what;
  const int64_t s = x_.sequence(b), row = x_.row_q(b, i), kv_head = h / (c.num_heads / c.num_kv_heads);
  const double log_sum = lse[x_.lse.offset(s, h, row, 0)];
  if (log_sum == -INFINITY) return;
  const double rescale = 65536.0 / (65536.0 - std::lround(static_cast<double>(c.dropout_p) * 65536));
  std::vector<double> gradient(static_cast<size_t>(c.head_dim_v));
  double delta = x_.dlse.exists() ? -x_.dlse.get(s, h, row, 0) : 0;
  for (int64_t d = 0; d < c.head_dim_v; ++d) {
    gradient[d] = x_.dout.get(s, h, row, d);
    delta += x_.out.get(s, h, row, d) * gradient[d];
  }
  for (int64_t j = 0; j < x_.length_k(b); ++j) {
    if (!visible(b, i, j)) continue;
    double derivative;
    const double p = std::exp(score(b, h, i, j, &derivative) - log_sum);
    const double kept = keeps(c.dropout_seed, c.dropout_p, b, h, i, j) ? rescale : 0;
    const int64_t column = x_.row_k(b, j);
    const double* const value = &v_[x_.v.offset(s, kv_head, column, 0)];
    double* const dvalue = &dv[x_.dv.offset(s, kv_head, column, 0)];
    double dp = 0;
    for (int64_t d = 0; d < c.head_dim_v; ++d) {
      dp += kept * gradient[d] * value[d];
      dvalue[d] += kept * p * gradient[d];
    }
    double ds = p * (dp - delta);
    if (x_.dbias.exists()) dbias[x_.dbias.offset(b, h, i, j)] += ds;
    if (x_.drelative_bias.exists())
      drelative_bias[x_.drelative_bias.offset(0, h, 0, j - i + c.seqlen_q - 1)] += ds;
    ds *= derivative * c.softmax_scale;
    const double* const query = &q_[x_.q.offset(s, h, row, 0)];
    const double* const key = &k_[x_.k.offset(s, kv_head, column, 0)];
    double* const dquery = &dq[x_.dq.offset(s, h, row, 0)];
    double* const dkey = &dk[x_.dk.offset(s, kv_head, column, 0)];
    for (int64_t d = 0; d < c.head_dim; ++d) {
      dquery[d] += ds * key[d];
      dkey[d] += ds * query[d];
    }
  }
}

Difference compare(const Array& array, const std::vector<double>& reference) {
  Difference difference;
  array.for_each([&](int64_t a, int64_t b, int64_t c, int64_t d) {
    const double expected = reference[array.offset(a, b, c, d)], got = array.get(a, b, c, d);
    if (std::isinf(expected) || !std::isfinite(got)) {
      if (got != expected) difference.largest = INFINITY;
      return;
    }
    difference.largest = std::max(difference.largest, std::fabs(got - expected));
    difference.scale = std::max(difference.scale, std::fabs(expected));
  });
  return difference;
}

}  // namespace fastattn_test
