// Rotary position embedding of queries and keys (Su et al., "RoFormer", arXiv:2104.09864), in the convention
// of transformers' Llama: element i of a head turns with element i + rotary_dim / 2.
#ifndef FASTATTN_CPU_ROTARY_H
#define FASTATTN_CPU_ROTARY_H

#include <string.h>

#include "pack.h"
#include "unit.h"

namespace fastattn::FASTATTN_ISA_NS {

constexpr int64_t kMostRotaryDim = 256;

// A position's angles, once for all its heads: y = x * cos + partner(x) * sin, signs included. Zeros behind.
struct Turn {
  float cos[kMostRotaryDim + W] = {};
  float sin[kMostRotaryDim + W] = {};
};

template <class T>
FASTATTN_ALWAYS void load_turn(const fastattn_rotary& io, int64_t b, int64_t n, Turn* turn) {
  const typename T::Storage* cos =
      (const typename T::Storage*)io.cos + b * io.cos_stride_b + n * io.cos_stride_n;
  const typename T::Storage* sin =
      (const typename T::Storage*)io.sin + b * io.sin_stride_b + n * io.sin_stride_n;
  const int64_t half = io.rotary_dim / 2;
  load_row<T>(cos, io.rotary_dim, turn->cos, 0);
  // The transpose of the rotation takes each half's sine to the other half.
  load_row<T>(io.transposed ? sin + half : sin, half, turn->sin, 0);
  load_row<T>(io.transposed ? sin : sin + half, half, turn->sin + half, 0);
  float* negative = io.transposed ? turn->sin + half : turn->sin;
  for (int64_t i = 0; i < half; ++i) negative[i] = -negative[i];
}

template <class T>
FASTATTN_ALWAYS void rotate_row(const Turn& turn, const typename T::Storage* x, int64_t rotary_dim,
                                int64_t head_dim, typename T::Storage* out) {
  const int64_t half = rotary_dim / 2;
  int64_t i = 0;
  for (; i + W <= half; i += W) {
    const vf low = T::load(x + i), high = T::load(x + half + i);
    T::store_to(out + i, low * load(turn.cos + i) + high * load(turn.sin + i));
    T::store_to(out + half + i, high * load(turn.cos + half + i) + low * load(turn.sin + half + i));
  }
  if (i < half) {
    const vf low = load_tail<T>(x + i, half - i), high = load_tail<T>(x + half + i, half - i);
    store_tail<T>(out + i, low * load(turn.cos + i) + high * load(turn.sin + i), half - i);
    store_tail<T>(out + half + i, high * load(turn.cos + half + i) + low * load(turn.sin + half + i),
                  half - i);
  }
  if (rotary_dim < head_dim)
    memcpy(out + rotary_dim, x + rotary_dim, (size_t)(head_dim - rotary_dim) * sizeof *out);
}

template <class T>
FASTATTN_ALWAYS void rotate_heads(const Turn& turn, const fastattn_rotary& io, const fastattn_tensor& x,
                                  const fastattn_tensor& out, int64_t heads, int64_t b, int64_t n) {
  typedef typename T::Storage Storage;
  const Storage* from = (const Storage*)x.data + b * x.stride_b + n * x.stride_n;
  Storage* to = (Storage*)out.data + b * out.stride_b + n * out.stride_n;
  for (int64_t h = 0; h < heads; ++h)
    rotate_row<T>(turn, from + h * x.stride_h, io.rotary_dim, io.head_dim, to + h * out.stride_h);
}

template <class T>
void rotary(Work* work) {
  const fastattn_rotary& io = *work->rotary;
  Turn turn;
  take_ranges(*work, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const int64_t b = r / io.seqlen, n = r % io.seqlen;
      if (io.table_dtype == FASTATTN_F32)
        load_turn<F32>(io, b, n, &turn);
      else
        load_turn<T>(io, b, n, &turn);
      rotate_heads<T>(turn, io, io.q, io.q_out, io.num_heads, b, n);
      rotate_heads<T>(turn, io, io.k, io.k_out, io.num_kv_heads, b, n);
    }
  });
}

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_ROTARY_H
