// The three element types. Each says how two fp32 numbers become an operand register, how far one matrix
// instruction reaches along the summed dimension, and how its operands multiply.
//
// An operand register holds 32 bits of a row: two 16-bit elements or one fp32. A matrix instruction therefore
// covers 32 bytes of every row for all types, and ldmatrix loads operands of all of them.
#pragma once

#include "ptx.h"

namespace fastattn {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

using Operand = uint32_t[4];  // the left operand of one instruction, 16 rows x 32 bytes

template <typename T>
struct Element;

template <>
struct Element<Half> {
  static constexpr int kStep = 16;
  static constexpr uint32_t kInfinity = 0x7c00;
  __device__ __forceinline__ static uint32_t pack(float lo, float hi) { return ptx::pack_f16(lo, hi); }
  __device__ __forceinline__ static float to_float(Half x) { return ptx::from_f16(x.bits); }
  __device__ __forceinline__ static void mma(float (&d)[4], const Operand& a, uint32_t b0, uint32_t b1) {
    ptx::mma_f16(d, a, b0, b1);
  }
};

template <>
struct Element<BFloat16> {
  static constexpr int kStep = 16;
  static constexpr uint32_t kInfinity = 0x7f80;
  __device__ __forceinline__ static uint32_t pack(float lo, float hi) { return ptx::pack_bf16(lo, hi); }
  __device__ __forceinline__ static float to_float(BFloat16 x) {
    return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
  }
  __device__ __forceinline__ static void mma(float (&d)[4], const Operand& a, uint32_t b0, uint32_t b1) {
    ptx::mma_bf16(d, a, b0, b1);
  }
};

// fp32 as a sum of two tf32 numbers, hi + lo: of the four products only lo * lo is below fp32's own rounding
// and left out ("3xTF32").
template <>
struct Element<float> {
  static constexpr int kStep = 8;
  static constexpr uint32_t kInfinity = 0x7f800000;
  __device__ __forceinline__ static float to_float(float x) { return x; }
  __device__ __forceinline__ static void split(uint32_t x, uint32_t& hi, uint32_t& lo) {
    hi = ptx::to_tf32(__uint_as_float(x));
    lo = ptx::to_tf32(__uint_as_float(x) - __uint_as_float(hi));
  }
  __device__ __forceinline__ static void mma(float (&d)[4], const Operand& a, uint32_t b0, uint32_t b1) {
    Operand hi, lo;
    for (int i = 0; i < 4; ++i) split(a[i], hi[i], lo[i]);
    uint32_t hi0, lo0, hi1, lo1;
    split(b0, hi0, lo0);
    split(b1, hi1, lo1);
    ptx::mma_tf32(d, lo, hi0, hi1);
    ptx::mma_tf32(d, hi, lo0, lo1);
    ptx::mma_tf32(d, hi, hi0, hi1);
  }
};

// Accumulator tiles -> left operand, for the product that follows. Within an accumulator tile of 16 x 8, lane
// l holds columns 2 (l % 4) and 2 (l % 4) + 1 of rows l / 4 and l / 4 + 8. For 16-bit types two neighbouring
// tiles are one operand. For fp32 the operand wants columns l % 4 and l % 4 + 4; since the order of summation
// is free, column 2t stands at place t and 2t + 1 at place t + 4, and load_transposed (tile.h) reads the
// other matrix's rows in the same order.
template <typename T, int kTiles>
__device__ __forceinline__ void to_operand(Operand& a, const float (&acc)[kTiles][4], int step) {
  if constexpr (sizeof(T) == 2) {
    a[0] = Element<T>::pack(acc[2 * step][0], acc[2 * step][1]);
    a[1] = Element<T>::pack(acc[2 * step][2], acc[2 * step][3]);
    a[2] = Element<T>::pack(acc[2 * step + 1][0], acc[2 * step + 1][1]);
    a[3] = Element<T>::pack(acc[2 * step + 1][2], acc[2 * step + 1][3]);
  } else {
    a[0] = __float_as_uint(acc[step][0]);
    a[1] = __float_as_uint(acc[step][2]);
    a[2] = __float_as_uint(acc[step][1]);
    a[3] = __float_as_uint(acc[step][3]);
  }
}

}  // namespace fastattn
