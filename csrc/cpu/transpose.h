// The transpose of a W x W block of 32-bit lanes in registers, and reductions of W vectors at once.
#ifndef FASTATTN_CPU_TRANSPOSE_H
#define FASTATTN_CPU_TRANSPOSE_H

#include "vec.h"

namespace fastattn::FASTATTN_ISA_NS {

// Lane l of the result is a[l] where bit `kStep` of l is clear, else b[l - kStep] (kLow), and
// a[l + kStep] / b[l] (not kLow): one exchange of the butterfly that transposes a W x W block.
template <int kStep, bool kLow, int... kLane>
FASTATTN_ALWAYS vf exchange(vf a, vf b) {
#define FASTATTN_LANE(l) \
  (kLow ? ((l) & kStep ? W + (l) - kStep : (l)) : ((l) & kStep ? W + (l) : (l) + kStep))
#define FASTATTN_LANES4(l) FASTATTN_LANE(l), FASTATTN_LANE(l + 1), FASTATTN_LANE(l + 2), FASTATTN_LANE(l + 3)
#if FASTATTN_VECTOR_BYTES == 64
  return __builtin_shufflevector(a, b, FASTATTN_LANES4(0), FASTATTN_LANES4(4), FASTATTN_LANES4(8),
                                 FASTATTN_LANES4(12));
#elif FASTATTN_VECTOR_BYTES == 32
  return __builtin_shufflevector(a, b, FASTATTN_LANES4(0), FASTATTN_LANES4(4));
#else
  return __builtin_shufflevector(a, b, FASTATTN_LANES4(0));
#endif
#undef FASTATTN_LANES4
#undef FASTATTN_LANE
}
template <int kStep>
FASTATTN_ALWAYS void butterfly(vf (&x)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & kStep) continue;
    const vf a = x[i], b = x[i + kStep];
    x[i] = exchange<kStep, true>(a, b);
    x[i + kStep] = exchange<kStep, false>(a, b);
  }
  if constexpr (kStep > 1) butterfly<kStep / 2>(x);
}

// Lane i of the result is reduce(x[i], fold), bit for bit.
template <class Fold, int kStep = W / 2>
FASTATTN_ALWAYS vf reduce_each(vf (&x)[W], Fold fold) {
#pragma GCC unroll 8
  for (int i = 0; i < kStep; ++i)
    x[i] = fold(exchange<kStep, true>(x[i], x[i + kStep]), exchange<kStep, false>(x[i], x[i + kStep]));
  if constexpr (kStep > 1) return reduce_each<Fold, kStep / 2>(x, fold);
  return x[0];
}

}  // namespace fastattn::FASTATTN_ISA_NS

#endif  // FASTATTN_CPU_TRANSPOSE_H
