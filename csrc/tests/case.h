// A Case says what to compute; an Instance holds its arrays and the structs of the C ABI that point to them.
#pragma once

#include <string>

#include "array.h"

namespace fastattn_test {

enum class Layout {
  kContiguous,  // (b, h, n, d)
  kRowsFirst,   // (b, n, h, d) viewed as (b, h, n, d): what a projection gives
  kGaps,        // odd strides with unused elements between rows
};
enum class KeyMask { kNone, kRight, kLeft, kHoles, kOneRowEmpty };
enum class Bias { kNone, kFull, kPerHead, kPerBatch, kPerKey };

struct Case {
  int dtype = FASTATTN_F32;
  int64_t batch = 2, num_heads = 2, num_kv_heads = 2, seqlen_q = 17, seqlen_k = 19, head_dim = 16,
          head_dim_v = 16;
  float softmax_scale = 0.25f, softcap = 0, dropout_p = 0;
  uint64_t dropout_seed = 0x9e3779b97f4a7c15u;
  bool causal = false;
  int64_t window_left = -1, window_right = -1;
  std::vector<int64_t> lengths_q, lengths_k;  // not empty: packed layout
  KeyMask key_mask = KeyMask::kNone;
  Bias bias = Bias::kNone;
  int bias_dtype = FASTATTN_F32;
  bool relative_bias = false;
  int alibi = 0;  // 1: (num_heads), 2: (batch, num_heads)
  bool dlse = false;
  Layout layout = Layout::kContiguous;
  double deviation = 1.0;  // of the random q and k
  uint64_t random_seed = 1;
  bool want_dq = true, want_dk = true, want_dv = true, want_dbias = true, want_drelative = true;

  bool packed() const { return !lengths_q.empty(); }
  std::string describe() const;
};

// Small random problems with every feature and every combination, some of them of several key tiles.
Case random_case(Random& random);

class Instance {
 public:
  Instance(const Case& what, Edge edge);

  fastattn_status forward(int threads);
  fastattn_status backward(int threads);
  fastattn_status forward(const fastattn_executor& executor);
  fastattn_status backward(const fastattn_executor& executor);

  // Addresses that hide the layout: (sequence, head, row, column) of an array of rows.
  int64_t length_q(int64_t b) const { return what.packed() ? what.lengths_q[b] : what.seqlen_q; }
  int64_t length_k(int64_t b) const { return what.packed() ? what.lengths_k[b] : what.seqlen_k; }
  int64_t sequence(int64_t b) const { return what.packed() ? 0 : b; }
  int64_t row_q(int64_t b, int64_t i) const { return what.packed() ? offsets_q_at(b) + i : i; }
  int64_t row_k(int64_t b, int64_t j) const { return what.packed() ? offsets_k_at(b) + j : j; }
  bool key_visible(int64_t b, int64_t j) const {
    return what.key_mask == KeyMask::kNone || key_mask.data()[b * key_mask_stride + j] != 0;
  }

  Case what;
  Array q, k, v, out, dout, dq, dk, dv;  // (batch or 1, heads, rows, columns)
  Array lse, dlse;                       // (batch or 1, heads, rows, 1)
  Array bias, dbias;                     // (batch, heads, rows, columns), broadcast by strides of 0
  Array relative_bias, drelative_bias;   // (1, heads, 1, seqlen_q + seqlen_k - 1)
  Array alibi;                           // (batch, heads, 1, 1)
  GuardedMemory key_mask;                // (batch, seqlen_k) bytes
  int64_t key_mask_stride = 0;
  fastattn_problem problem = {};
  fastattn_forward_result result = {};
  fastattn_backward_io io = {};

 private:
  Array rows(int dtype, int64_t batch, int64_t heads, int64_t length, int64_t columns) const;
  int64_t offsets_q_at(int64_t b) const { return reinterpret_cast<int32_t*>(offsets_q_.data())[b]; }
  int64_t offsets_k_at(int64_t b) const { return reinterpret_cast<int32_t*>(offsets_k_.data())[b]; }
  void make_key_mask(Random& random);
  void make_biases(Random& random);
  void describe_problem();
  void describe_results();
  void allow_writes(bool inputs, bool forward_results);

  Edge edge_;
  GuardedMemory offsets_q_, offsets_k_;
};

}  // namespace fastattn_test
