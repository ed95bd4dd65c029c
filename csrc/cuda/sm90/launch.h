// The host's side of the sm_90a kernels: when they serve, and the tensor maps they are given.
#pragma once

#include "../host.h"
#include "params.h"

namespace fastattn::sm90 {

// The kernel that serves in the place of the sm_80 ones of `set`, or null. They run on compute capability 9.0
// only, and compute what the plain variant does.
const ForwardKernel* find_forward(const KernelSet& set, int capability, int splits);

// Tensor maps of q, k and v. Finds the driver's encoder through the runtime: nothing links against the
// driver.
fastattn_status encode_forward(const Params& params, const ForwardKernel& kernel, ForwardParams& x);

extern const ForwardKernel* const kForwardKernels[];  // ends with null; written by CMake from its table

}  // namespace fastattn::sm90
