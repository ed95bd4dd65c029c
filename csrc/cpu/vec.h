// The one SIMD type of the kernels: a vector of FASTATTN_VECTOR_BYTES bytes of 32-bit lanes, as GCC and Clang
// spell it. Arithmetic, comparison and selection are the language's own operators; this file adds what no
// operator says. Everything lives in the instruction set's namespace: inline code compiled with AVX flags
// must never be merged by the linker with that of a lower instruction set.
#ifndef FASTATTN_CPU_VEC_H
#define FASTATTN_CPU_VEC_H

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define FASTATTN_ALWAYS static inline __attribute__((always_inline))
#define FASTATTN_ALWAYS_MEMBER inline __attribute__((always_inline))

namespace fastattn::FASTATTN_ISA_NS {

constexpr int kVectorBytes = FASTATTN_VECTOR_BYTES;
constexpr int W = kVectorBytes / 4;  // lanes

typedef float vf __attribute__((vector_size(kVectorBytes)));
typedef int32_t vi __attribute__((vector_size(kVectorBytes)));
typedef uint32_t vu __attribute__((vector_size(kVectorBytes)));
typedef uint64_t vu64 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t vu16 __attribute__((vector_size(kVectorBytes / 2)));

FASTATTN_ALWAYS vi as_int(vf x) { return (vi)x; }
FASTATTN_ALWAYS vu as_uint(vf x) { return (vu)x; }
FASTATTN_ALWAYS vf as_float(vi x) { return (vf)x; }
FASTATTN_ALWAYS vf as_float(vu x) { return (vf)x; }

template <class Vector, class T>
FASTATTN_ALWAYS Vector load_as(const T* p) {
  Vector v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
FASTATTN_ALWAYS vf load(const float* p) { return load_as<vf>(p); }
template <class Vector, class T>
FASTATTN_ALWAYS void store(T* p, Vector v) {
  __builtin_memcpy(p, &v, sizeof v);
}

FASTATTN_ALWAYS vf splat(float x) {
#if defined(__AVX512F__) && FASTATTN_VECTOR_BYTES == 64
  return (vf)_mm512_set1_ps(x);
#elif defined(__AVX2__) && FASTATTN_VECTOR_BYTES == 32
  return (vf)_mm256_set1_ps(x);
#else
  vf v;
  for (int i = 0; i < W; ++i) v[i] = x;
  return v;
#endif
}
FASTATTN_ALWAYS vi splat(int32_t x) { return x - vi{}; }
FASTATTN_ALWAYS vu splat(uint32_t x) { return x - vu{}; }

FASTATTN_ALWAYS vi lane_index() {
  vi v;
  for (int i = 0; i < W; ++i) v[i] = i;
  return v;
}

// max(a, b) as x86 has it: b where either is NaN, so put the constant first and a NaN comes through.
FASTATTN_ALWAYS vf vmax(vf a, vf b) {
#if defined(__AVX512F__) && FASTATTN_VECTOR_BYTES == 64
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__) && FASTATTN_VECTOR_BYTES == 32
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__) && FASTATTN_VECTOR_BYTES == 16
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

FASTATTN_ALWAYS vf vmin(vf a, vf b) {  // likewise
#if defined(__AVX512F__) && FASTATTN_VECTOR_BYTES == 64
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__) && FASTATTN_VECTOR_BYTES == 32
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// Reductions fold the vector in halves, in the same order on every instruction set of the same width.
template <class Fold>
FASTATTN_ALWAYS float reduce(vf v, Fold fold) {
  typedef float v4 __attribute__((vector_size(16)));
  v4 r;
#if FASTATTN_VECTOR_BYTES == 64
  typedef float v8 __attribute__((vector_size(32)));
  v8 half = fold(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                 __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
  r = fold(__builtin_shufflevector(half, half, 0, 1, 2, 3), __builtin_shufflevector(half, half, 4, 5, 6, 7));
#elif FASTATTN_VECTOR_BYTES == 32
  r = fold(__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7));
#else
  r = v;
#endif
  r = fold(r, __builtin_shufflevector(r, r, 2, 3, 0, 1));
  r = fold(r, __builtin_shufflevector(r, r, 1, 0, 3, 2));
  return r[0];
}
FASTATTN_ALWAYS float hsum(vf v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}
FASTATTN_ALWAYS float hmax(vf v) {
  return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}

// Whether a comparison holds in any lane.
FASTATTN_ALWAYS bool any(vi mask) {
#if defined(__AVX512F__) && FASTATTN_VECTOR_BYTES == 64
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  return hmax(mask != 0 ? splat(1.0f) : vf{}) != 0.0f;
#endif
}

// 32 x 32 bit products of all lanes are formed for even and odd lanes apart: of_even_lanes() multiplies the
// former, and odd_to_even() brings what is in odd lanes there; by a shuffle, not a shift, which would wait
// for the port of the multiplier. What is in the other lanes then does not matter.
FASTATTN_ALWAYS vu product_of_even_lanes(vu a, uint32_t b) {
#if defined(__AVX512F__) && FASTATTN_VECTOR_BYTES == 64
  return (vu)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi32((int)b));
#elif defined(__AVX2__) && FASTATTN_VECTOR_BYTES == 32
  return (vu)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32((int)b));
#else
  return (vu)(((vu64)a & 0xFFFFFFFFu) * (uint64_t)b);
#endif
}
FASTATTN_ALWAYS vu odd_to_even(vu a) {
#if defined(__AVX512F__) && FASTATTN_VECTOR_BYTES == 64
  return (vu)_mm512_movehdup_ps((__m512)a);
#elif defined(__AVX2__) && FASTATTN_VECTOR_BYTES == 32
  return (vu)_mm256_movehdup_ps((__m256)a);
#else
  return (vu)((vu64)a >> 32);
#endif
}
FASTATTN_ALWAYS vu join_even_lanes(vu even, vu odd) {
#if defined(__AVX512F__) && FASTATTN_VECTOR_BYTES == 64
  return (vu)_mm512_mask_moveldup_ps((__m512)even, 0xAAAA, (__m512)odd);
#else
  return (vu)(((vu64)even & 0xFFFFFFFFu) | (vu64)odd << 32);
#endif
}

// a ^ b ^ c
FASTATTN_ALWAYS vu xor3(vu a, vu b, vu c) {
#if defined(__AVX512F__) && FASTATTN_VECTOR_BYTES == 64
  return (vu)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

// ---- half-precision lanes -------------------------------------------------------------------

FASTATTN_ALWAYS vf from_bf16(vu16 x) { return as_float(__builtin_convertvector(x, vu) << 16); }

FASTATTN_ALWAYS vu16 to_bf16(vf x) {  // round to nearest, ties to even; NaN stays NaN
#if defined(__AVX512BF16__) && FASTATTN_VECTOR_BYTES == 64
  return (vu16)_mm512_cvtneps_pbh((__m512)x);
#else
  const vu u = as_uint(x);
  const vu rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  const vu nan = (u >> 16) | 0x40u;
  return __builtin_convertvector(x == x ? rounded : nan, vu16);
#endif
}

FASTATTN_ALWAYS vf from_f16(vu16 x) {
#if defined(__AVX512F__) && FASTATTN_VECTOR_BYTES == 64
  return (vf)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__) && FASTATTN_VECTOR_BYTES == 32
  return (vf)_mm256_cvtph_ps((__m128i)x);
#else
  const vu u = __builtin_convertvector(x, vu);
  const vu sign = (u & 0x8000u) << 16, magnitude = (u & 0x7FFFu) << 13;
  const vf scaled =
      as_float(magnitude) * splat(0x1p112f);   // exponent bias 127 - 15; exact for subnormals too
  const vu special = magnitude | 0x7F800000u;  // inf, NaN
  return as_float((magnitude >= 0x0F800000u ? special : as_uint(scaled)) | sign);
#endif
}

FASTATTN_ALWAYS vu16 to_f16(vf x) {
#if defined(__AVX512F__) && FASTATTN_VECTOR_BYTES == 64
  return (vu16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__) && FASTATTN_VECTOR_BYTES == 32
  return (vu16)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const vu u = as_uint(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  const vu normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const vu subnormal = as_uint(as_float(magnitude) + splat(0.5f)) - 0x3F000000u;  // the adder rounds for us
  vu r = magnitude < 0x38800000u ? subnormal : normal;
  r = magnitude >= 0x47800000u ? splat(0x7C00u) : r;
  r = magnitude > 0x7F800000u ? splat(0x7E00u) : r;
  return __builtin_convertvector(r | sign, vu16);
#endif
}

// Two bf16 in each 32-bit lane: the even-indexed element of the sum in the low half.
FASTATTN_ALWAYS vu pair_bf16(vf even, vf odd) {
#if defined(__AVX512BF16__) && FASTATTN_VECTOR_BYTES == 64
  vu order;
  for (int i = 0; i < W; ++i) order[i] = (uint32_t)(i | (W + i) << 16);
  const __m512bh halves = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (vu)_mm512_permutexvar_epi16((__m512i)order, (__m512i)halves);
#else
  return __builtin_convertvector(to_bf16(even), vu) | __builtin_convertvector(to_bf16(odd), vu) << 16;
#endif
}

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_VEC_H
