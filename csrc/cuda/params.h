// What every kernel is given: fastattn_problem and its results, checked and narrowed by plan.cpp.
#pragma once

#include <stdint.h>

namespace fastattn {

// Lengths stay below kMaxLength, and kUnlimited stands for an unlimited side of the window, so that sums of
// three of them fit 32 bits.
constexpr int kMaxLength = 1 << 28;
constexpr int kUnlimited = 1 << 29;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct TensorArg {
  void* data;
  int64_t stride_b, stride_h;
  int32_t stride_n;
  bool aligned;  // all rows start on 16-byte boundaries
};

// A number per (batch, head, query row).
struct RowArg {
  float* data;
  int64_t stride_b, stride_h;
};

struct BiasArg {
  void* data;
  int64_t stride_b, stride_h, stride_q, stride_k;
};

// What backward needs of a query row, side by side for one 8-byte load: the base-2 log-sum-exp (+inf for a
// row that sees no key, so that every weight is exp2(-inf) = 0), and what the accumulators of dout v^T start
// from, -delta / dropout_scale with delta = sum(out * dout) - dlse. The gradient of a score is its weight
// times that sum, or times the start alone where the weight is dropped; results are scaled at the end.
struct alignas(8) RowStatistics {
  float lse2;
  float minus_delta;
};

struct Params {
  TensorArg q, k, v, out, dout, dq, dk, dv;
  RowArg lse, dlse;
  int32_t wants_dk, wants_dv;  // whether those have data, for loops that ask in every step
  RowStatistics* rows;         // workspace of backward: rows_stride_b, rows_stride_h
  int64_t rows_stride_b, rows_stride_h;

  // Workspace of a forward pass split over keys: (split, batch, head, query) rows of head_dim_v floats, and
  // their lse.
  int32_t splits;
  float* partial_out;
  float* partial_lse;

  int32_t batch, heads, kv_heads, group;  // group = heads / kv_heads
  int32_t len_q, len_k;                   // the longest in the packed layout
  int32_t dim, dim_v;
  int32_t load_dim, load_dim_v;  // rounded up to 16 bytes: what q, k, v and dout are loaded with
  int64_t total_q, total_k;
  const int32_t* cu_q;  // null in the padded layout
  const int32_t* cu_k;

  float scale, scale_log2;          // scale_log2 = scale * log2(e)
  float softcap, softcap_argument;  // 0: none; 2 log2(e) scale / softcap
  int32_t left, right;  // key j is visible to query i when -left <= j - (i + len_k - len_q) <= right

  const uint8_t* key_mask;
  int64_t key_mask_stride_b;
  BiasArg bias;
  bool bias_is_float;  // else of the element type
  const float* relative_bias;
  int64_t relative_bias_stride_h;
  const float* alibi_slopes;
  int64_t alibi_stride_b, alibi_stride_h;

  uint32_t dropout_threshold;  // of 65536
  float dropout_scale;
  uint64_t dropout_seed;
  const uint64_t* dropout_seed_device;  // read instead when not null

  // Gradients of what is added to the scores (score_gradient.h).
  BiasArg dbias;
  int32_t dbias_batch, dbias_heads, dbias_q, dbias_k;  // extents of dbias: 1 where it is summed
  float* drelative_partial;                            // (head, tile diagonal, 2 * tile) partial sums
  float* drelative_bias;
  int64_t drelative_bias_stride_h;
  int32_t diagonals;  // tile diagonals of a head
  int32_t diagonal_tile;
};

// A kernel and the shape of its launch. Kernels of one instantiation are listed in a KernelSet
// (instance.cu.in).
struct Kernel {
  void (*function)(Params);
  int threads;
  int shared_bytes;
  int block_q;  // query rows a block owns, or steps through
  int block_k;
};

// Features of a variant: bits.
constexpr uint32_t kFeatureSoftcap = 1;
constexpr uint32_t kFeatureBias = 2;
constexpr uint32_t kFeatureRelative = 4;
constexpr uint32_t kFeatureAlibi = 8;
constexpr uint32_t kFeatureDropout = 16;

struct KernelSet {
  int dtype;
  int dim;  // the tile's head_dim: serves every head_dim and head_dim_v up to it
  uint32_t features;
  Kernel forward, dkdv, dk, dv, dq, score_gradient;  // a null function: absent
};

}  // namespace fastattn
