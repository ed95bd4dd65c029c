// The kernels of one instantiation, and how each is launched.
#pragma once

#include "forward.h"
#include "key_gradient.h"
#include "query_gradient.h"
#include "score_gradient.h"

namespace fastattn {

template <typename T, int kDim, uint32_t kFeatures>
KernelSet kernel_set(int dtype) {
  using V = Variant<kFeatures>;
  KernelSet set{dtype, kDim, kFeatures, {}, {}, {}, {}, {}, {}};
  using F = ForwardShape<T, kDim, V>;
  set.forward = {forward<T, kDim, V>, F::kTile.threads(), F::kSharedBytes, F::kTile.block_q(),
                 F::kTile.block_k};
  using K = KeyGradientShape<T, kDim, V>;
  const Kernel keys = {nullptr, K::kTile.threads(), K::kSharedBytes, K::kTile.block_q, K::kTile.block_k()};
  if constexpr (K::kTile.both) {
    set.dkdv = keys;
    set.dkdv.function = key_gradient<T, kDim, V, true, true>;
  } else {
    set.dk = set.dv = keys;
    set.dk.function = key_gradient<T, kDim, V, true, false>;
    set.dv.function = key_gradient<T, kDim, V, false, true>;
  }
  using Q = QueryGradientShape<T, kDim, V>;
  set.dq = {query_gradient<T, kDim, V>, Q::kTile.threads(), Q::kSharedBytes, Q::kTile.block_q(),
            Q::kTile.block_k};
  // No room for four tiles of 32 rows at fp32 and 256: that gradient is refused (launch.cpp).
  if constexpr ((V::kBias || V::kRelative) && sizeof(T) * kDim <= 512) {
    using S = ScoreGradientShape<T, kDim>;
    set.score_gradient = {score_gradient<T, kDim, V>, S::kThreads, S::kSharedBytes, S::kSide, S::kSide};
  }
  return set;
}

}  // namespace fastattn
