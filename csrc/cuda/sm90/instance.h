// The sm_90a kernels of one instantiation.
#pragma once

#include "forward.h"
#include "key_gradient.h"
#include "query_gradient.h"

namespace fastattn::sm90 {

template <typename T, int kDim>
KernelSet kernel_set(int dtype) {
  KernelSet set{dtype,
                kDim,
                forward_kernel<T, kDim>(),
                {},
                key_gradient_kernel<T, kDim, true, false>(),
                key_gradient_kernel<T, kDim, false, true>(),
                query_gradient_kernel<T, kDim>()};
  // Above, 2 x 128 accumulators a thread do not fit: dk and dv take a launch each.
  if constexpr (kDim <= 128) set.dkdv = key_gradient_kernel<T, kDim, true, true>();
  return set;
}

}  // namespace fastattn::sm90
