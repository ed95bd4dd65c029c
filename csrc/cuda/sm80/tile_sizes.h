// Tile sizes by element size and head dimension: pure functions, with the reason for each choice.
//
// Shared memory stays at or below 99 KiB, what a block may have on every architecture since sm_80 (sm_86,
// sm_89 and sm_120 have no more), and registers below 255 a thread without spills. Everything is counted in
// bytes of a row, so fp32 takes the tiles of 16-bit heads twice as wide.
#pragma once

#include <stdint.h>

#include <type_traits>

namespace fastattn {

constexpr int kSharedLimit = 99 * 1024;

struct ForwardTile {
  int warps;
  int m;        // tiles of 16 query rows a warp owns: 2 halves the shared loads where registers allow
  int block_k;  // keys a step
  bool q_in_registers;
  __host__ __device__ constexpr int block_q() const { return warps * m * 16; }
  __host__ __device__ constexpr int threads() const { return warps * 32; }
};

__host__ __device__ constexpr ForwardTile forward_tile(int element_bytes, int dim, bool plain, bool bias) {
  const int row = element_bytes * dim;
  if (element_bytes == 4) {  // both halves of every fp32 operand take registers: q stays in shared memory
    if (row <= 256) return {4, 1, 64, false};
    if (row <= 512) return {4, 1, 32, false};
    return {2, 1, 16, false};
  }
  if (row <= 128 && plain) return {4, 2, 64, true};
  if (row <= 256) return {8, 1, 64, !bias};  // where the bias lies takes registers
  return {4, 1, 32, false};                  // 128 registers of output leave no room for q
}

// dk and dv: a warp owns 16 keys and steps through queries.
struct KeyGradientTile {
  int warps;
  int block_q;  // queries a step
  int stages;
  bool k_in_registers;  // k and v operands held in registers
  bool both;            // dk and dv accumulate in one pass; else each takes a launch of its own
  __host__ __device__ constexpr int block_k() const { return warps * 16; }
  __host__ __device__ constexpr int threads() const { return warps * 32; }
};

__host__ __device__ constexpr KeyGradientTile key_gradient_tile(int element_bytes, int dim, bool relative) {
  const int row = element_bytes * dim;
  if (element_bytes == 4) {
    if (dim <= 64) return {4, 32, 2, false, true};
    if (dim <= 128) return {4, 16, 2, false, true};
    return {2, 16, 1, false, false};
  }
  if (row <= 128) return {8, 64, 2, !relative, true};  // what finds a diagonal's element takes registers
  if (row <= 256) return {8, 32, 2, false, true};
  return {4, 16, 2, false, false};  // 2 x 128 accumulators a thread do not fit
}

// dq: a warp owns 16 queries and steps through keys.
struct QueryGradientTile {
  int warps;
  int block_k;
  int stages;
  bool q_in_registers;  // q and dout operands held in registers
  __host__ __device__ constexpr int block_q() const { return warps * 16; }
  __host__ __device__ constexpr int threads() const { return warps * 32; }
};

__host__ __device__ constexpr QueryGradientTile query_gradient_tile(int element_bytes, int dim, bool bias) {
  const int row = element_bytes * dim;
  if (element_bytes == 4) {
    if (row <= 256) return {4, 32, 2, false};
    if (row <= 512) return {4, 16, 2, false};
    return {2, 16, 1, false};  // q, dout and one stage fill shared memory
  }
  if (row <= 128) return {8, 64, 2, !bias};  // as in forward
  if (row <= 256) return {8, 32, 2, !bias};
  return {4, 16, 2, false};
}

// Gradients of what is added to scores: square tiles, one 16-row strip a warp.
__host__ __device__ constexpr int score_gradient_tile(int element_bytes, int dim) {
  const int row = element_bytes * dim;
  return row <= 256 ? 64 : 32;
}

}  // namespace fastattn
