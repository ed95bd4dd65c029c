// The host's side of the sm_90a kernels: when they serve, and the tensor maps they are given.
#pragma once

#include "../host.h"
#include "params.h"

namespace fastattn::sm90 {

// The kernels that serve in the place of `set`, or null. They run on compute capability 9.0 only, and compute
// what the plain variant does. Products may be padded by a third (head dimension 96 to 128), not doubled (32
// to 64): docs/performance-cuda.md counts why.
const KernelSet* find_kernels(const fastattn::KernelSet& set, int capability);

// Tensor maps of q, k, v and dout. Finds the driver's encoder through the runtime: nothing links against the
// driver.
fastattn_status encode_maps(const Params& params, const Kernel& kernel, MappedParams& x);

extern const KernelSet* const kKernelSets[];  // ends with null; written by CMake from its table

}  // namespace fastattn::sm90
