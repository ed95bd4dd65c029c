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

struct ForwardParams {
  TensorMap q, k, v;
  Params params;
};

struct ForwardKernel {
  int dtype;
  int dim;
  void (*function)(ForwardParams);
  int threads;
  int shared_bytes;
  int block_q;
  int block_k;
};

constexpr int kBoxCols = 64;  // 128 bytes: the swizzle's width

}  // namespace fastattn::sm90
