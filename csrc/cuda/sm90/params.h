// What the sm_90a kernels are given, and how they are launched.
#pragma once

#include <cuda.h>

#include "../params.h"

namespace fastattn::sm90 {

// A tensor as TMA sees it: (batch, head, row, column), innermost last. An axis that the tensor does not have,
// or along which it repeats itself, has extent 1 in the map, and its step is 0.
struct TensorMap {
  CUtensorMap map;
  int32_t head_step, batch_step;
};

struct MappedParams {
  TensorMap q, k, v, dout;  // dout: in backward
  Params params;
};

struct Kernel {
  void (*function)(MappedParams);
  int threads;
  int shared_bytes;
  int block_q;
  int block_k;
};

// The kernels of one element type and head dimension. A null dkdv: dk and dv take a launch each.
struct KernelSet {
  int dtype;
  int dim;
  Kernel forward, dkdv, dk, dv, dq;
};

constexpr int kBoxCols = 64;  // 128 bytes: the swizzle's width

}  // namespace fastattn::sm90
