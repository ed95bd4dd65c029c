// What the kernels read of a problem: sequences, rows and visibility, the same arithmetic for both layouts.
#ifndef FASTATTN_CPU_PROBLEM_H
#define FASTATTN_CPU_PROBLEM_H

#include <stddef.h>
#include <stdint.h>

#include "fastattn.h"

namespace fastattn {

// Tile sizes are the same on every instruction set, so that results differ by rounding of sums alone.
constexpr int kQueryTile = 64;    // rows of a score tile
constexpr int kKeyTile = 256;     // its columns, a multiple of kDropoutBlock
constexpr int kTilesPerUnit = 8;  // query tiles that may share one packing of a key tile

// Sequence b: its lengths and, in the packed layout, its first rows.
struct Sequence {
  int64_t nq, nk, q0, k0;
};

static inline Sequence sequence_of(const fastattn_problem& p, int64_t b) {
  if (p.cu_seqlens_q == nullptr) return {p.seqlen_q, p.seqlen_k, 0, 0};
  const int64_t q0 = p.cu_seqlens_q[b], k0 = p.cu_seqlens_k[b];
  return {p.cu_seqlens_q[b + 1] - q0, p.cu_seqlens_k[b + 1] - k0, q0, k0};
}

static inline int64_t batch_offset(const fastattn_problem& p, int64_t b, int64_t stride_b) {
  return p.cu_seqlens_q != nullptr ? 0 : b * stride_b;
}

// Row `row0` of head h of sequence b, as elements of type T.
template <class T>
static inline T* row_of(const fastattn_problem& p, const fastattn_tensor& t, int64_t b, int64_t h,
                        int64_t row0) {
  return (T*)t.data + batch_offset(p, b, t.stride_b) + h * t.stride_h + row0 * t.stride_n;
}

// lse, dlse: (batch, heads, row), or (heads, packed row).
template <class T>
static inline T* scalar_of(const fastattn_problem& p, T* data, int64_t stride_b, int64_t stride_h, int64_t b,
                           int64_t h, int64_t row0) {
  return data + batch_offset(p, b, stride_b) + h * stride_h + row0;
}

// Which keys query i sees, key_mask aside: [begin(i), end(i)), both ascending in i.
struct Visibility {
  int64_t nk, shift, left, right;  // left, right < 0: unlimited

  int64_t begin(int64_t i) const {
    const int64_t first = left < 0 ? 0 : i + shift - left;
    return first < 0 ? 0 : first > nk ? nk : first;
  }
  int64_t end(int64_t i) const {
    const int64_t last = right < 0 ? nk : i + shift + right + 1;
    return last < 0 ? 0 : last > nk ? nk : last;
  }
};

static inline Visibility visibility_of(const fastattn_problem& p, const Sequence& s) {
  // A window wider than the sequences limits nothing, and would overflow if it were far wider.
  const int64_t reach = s.nq + s.nk;
  int64_t right = p.window_right > reach ? -1 : p.window_right;
  if (p.causal) right = 0;
  return {s.nk, s.nk - s.nq, p.window_left > reach ? -1 : p.window_left, right};
}

static inline bool is_fp32(int32_t dtype) {
  return dtype == FASTATTN_F32 || dtype == FASTATTN_F32_BF16_PRODUCTS || dtype == FASTATTN_F32_SPLIT_PRODUCTS;
}

static inline bool has_score_terms(const fastattn_problem& p) {
  return p.softcap > 0.0f || p.bias.data != nullptr || p.relative_bias != nullptr ||
         p.alibi_slopes != nullptr || !(p.softmax_scale > 0.0f);
}

// Few queries against each kv head: time goes into reading K and V, and decode.h takes over. A property of
// the sequence alone, so that the rest of the batch does not change its rounding.
constexpr int kThinRows = 8;
static inline bool is_thin(const fastattn_problem& p, const Sequence& s) {
  return s.nq <= kThinRows && s.nq * (p.num_heads / p.num_kv_heads) <= 4 * kThinRows;
}

// Query tiles whose state fits into L2 beside a packed key tile.
static inline int64_t most_tiles_per_unit(const fastattn_problem& p) {
  return p.head_dim + p.head_dim_v <= 128 ? kTilesPerUnit : kTilesPerUnit / 2;
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace fastattn

#endif  // FASTATTN_CPU_PROBLEM_H
