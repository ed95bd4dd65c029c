// Elementary functions on vectors: exp, log, tanh and GELU, each by a polynomial on a reduced argument.
#ifndef FASTATTN_CPU_MATH_H
#define FASTATTN_CPU_MATH_H

#include "vec.h"

namespace fastattn::FASTATTN_ISA_NS {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kInf = __builtin_inff();

// e^x for x <= 0, which is what softmax asks for; larger arguments count as 0, and below -88 the result is
// exactly 0. NaN stays NaN.
//
// x = n ln 2 + f with n the nearest integer to x log2 e: adding 1.5 * 2^23 + 127 leaves n + 127 in the low
// mantissa bits, which shifted by 23 are the bits of 2^n (0 for n = -127). e^f by a degree-5 minimax
// polynomial, 1e-7 relative. Arguments stay in natural units all the way, so that s - lse is rounded once,
// where it is small.
FASTATTN_ALWAYS vf exp_nonpositive(vf x) {
  const vf magic = splat(12582912.0f + 127.0f);
  x = vmin(vf{}, x);
  x = vmax(splat(-127.0f * kLn2), x);
  const vf t = x * kLog2e + magic;
  const vf f = x - (t - magic) * kLn2;
  vf p = splat(8.290272106e-03f);
  p = p * f + splat(4.189815964e-02f);
  p = p * f + splat(1.666763813e-01f);
  p = p * f + splat(4.999914784e-01f);
  p = p * f + splat(9.999997063e-01f);
  p = p * f + splat(1.0f);
  return p * as_float(as_int(t) << 23);
}

// Natural logarithm of a positive, normal x: 2 artanh((m - 1) / (m + 1)) + e ln 2 with m in [sqrt(1/2),
// sqrt(2)).
FASTATTN_ALWAYS vf log_positive(vf x) {
  const vi bits = as_int(x), e = (bits - 0x3F3504F3) >> 23;
  const vf m = as_float(bits - (e << 23));
  const vf t = (m - 1.0f) / (m + 1.0f), z = t * t;
  vf p = splat(2.0f / 9.0f);
  p = p * z + splat(2.0f / 7.0f);
  p = p * z + splat(2.0f / 5.0f);
  p = p * z + splat(2.0f / 3.0f);
  const vf log_m = t * 2.0f + t * z * p;
  const vf result = __builtin_convertvector(e, vf) * kLn2 + log_m;
  return x == x && x < kInf ? result : x;
}

// tanh: an odd polynomial near 0 (coefficients of Cephes' tanhf), 1 - 2 / (e^2x + 1) elsewhere.
FASTATTN_ALWAYS vf tanh(vf x) {
  const vf magnitude = as_float(as_int(x) & 0x7FFFFFFF), z = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * z + splat(2.06390887954e-2f);
  p = p * z + splat(-5.37397155531e-2f);
  p = p * z + splat(1.33314422036e-1f);
  p = p * z + splat(-3.33332819422e-1f);
  const vf small = x + x * z * p;
  const vf e = exp_nonpositive(magnitude * -2.0f);
  const vf large = (1.0f - e) / (1.0f + e);
  const vf with_sign = as_float(as_int(large) | (as_int(x) & INT32_MIN));
  return magnitude < 0.625f ? small : with_sign;
}

// x Phi(x), by the normal distribution's integral: Phi(x) = 1/2 + x p(x^2) up to |x| = 5.2, where it is 1 or
// 0 to 1e-7. A minimax polynomial without division; its argument runs from -1 to 1, so its terms stay small.
FASTATTN_ALWAYS vf gelu(vf x) {
  constexpr float kEnd = 5.2f;
  const vf inside = vmin(splat(kEnd), vmax(splat(-kEnd), x));
  const vf w = inside * inside * (2.0f / (kEnd * kEnd)) - 1.0f;
  constexpr float kCoefficients[] = {1.66073243e-04f, -5.31208545e-04f, 7.06516558e-04f, -1.06626119e-03f,
                                     2.54393527e-03f, -4.97319013e-03f, 8.07423859e-03f, -1.24012241e-02f,
                                     1.81166964e-02f, -2.47518143e-02f, 3.19644251e-02f, -3.99265861e-02f,
                                     5.00260202e-02f, -6.77437717e-02f, 1.35949979e-01f};
  vf p = splat(kCoefficients[0]);
#pragma GCC unroll 16
  for (int i = 1; i < 15; ++i) p = p * w + splat(kCoefficients[i]);
  vf phi = inside * p + 0.5f;
  phi = x < -kEnd ? vf{} : phi;
  phi = x > kEnd ? splat(1.0f) : phi;
  return x * phi;
}

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_MATH_H
