// The sm_90a kernels of one instantiation.
#pragma once

#include "forward.h"
#include "key_gradient.h"
#include "query_gradient.h"

namespace fastattn::sm90 {

template <typename T, int kDim>
KernelSet kernel_set(int dtype) {
  KernelSet set{dtype, kDim, forward_kernel<T, kDim>(), {}, {}, {}, {}};
  if constexpr (kDim <= 128) {  // registers and shared memory hold no more
    set.dkdv = key_gradient_kernel<T, kDim, true, true>();
    set.dk = key_gradient_kernel<T, kDim, true, false>();
    set.dv = key_gradient_kernel<T, kDim, false, true>();
    set.dq = query_gradient_kernel<T, kDim>();
  }
  return set;
}

}  // namespace fastattn::sm90
