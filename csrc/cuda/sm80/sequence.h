// Where a (batch, head) lies in memory, in the padded and in the packed layout, and which keys its queries
// see.
#pragma once

#include "../params.h"
#include "copy.h"

namespace fastattn {

struct Sequence {
  int batch;
  int len_q, len_k;
  int64_t first_q, first_k;  // packed row of query 0 and key 0; 0 in the padded layout

  __device__ __forceinline__ Sequence(const Params& p, int b) : batch(b) {
    len_q = p.len_q, len_k = p.len_k, first_q = 0, first_k = 0;
    if (p.cu_q != nullptr) {
      // Where the caller understated the longest, fill_rest (auxiliary.cu) makes the sequence NaN.
      len_q = int(min(extent(p.cu_q, b, p.total_q, first_q), int64_t(p.len_q)));
      len_k = int(min(extent(p.cu_k, b, p.total_k, first_k), int64_t(p.len_k)));
    }
  }
  // The rows that offsets give a sequence, and the first of them. Offsets that reach outside the tensor are
  // cut off at its end: a bad offset reads nothing foreign.
  __device__ __forceinline__ static int64_t extent(const int32_t* cu, int b, int64_t total, int64_t& first) {
    first = max(int64_t(0), min(int64_t(cu[b]), total));
    return max(int64_t(0), min(int64_t(cu[b + 1]), total) - first);
  }
};

// The queries' (or keys', ...) matrix of one head. Strides of the batch are 0 in the packed layout.
template <typename T>
__device__ __forceinline__ Matrix<T> matrix_of(const TensorArg& x, int batch, int head, int64_t first,
                                               int rows, int cols) {
  T* data = static_cast<T*>(x.data) + batch * x.stride_b + head * x.stride_h + first * x.stride_n;
  return Matrix<T>{data, x.stride_n, rows, cols, x.aligned};
}
template <typename T>
__device__ __forceinline__ Matrix<T> query_matrix(const TensorArg& x, const Sequence& s, int head, int cols) {
  return matrix_of<T>(x, s.batch, head, s.first_q, s.len_q, cols);
}
template <typename T>
__device__ __forceinline__ Matrix<T> key_matrix(const TensorArg& x, const Sequence& s, int head, int cols) {
  return matrix_of<T>(x, s.batch, head, s.first_k, s.len_k, cols);
}
__device__ __forceinline__ float* row_pointer(const RowArg& x, const Sequence& s, int head) {
  return x.data + s.batch * x.stride_b + head * x.stride_h + s.first_q;
}
__device__ __forceinline__ RowStatistics* row_statistics(const Params& p, const Sequence& s, int head) {
  return p.rows + s.batch * p.rows_stride_b + head * p.rows_stride_h + s.first_q;
}

// A block's place in the one-dimensional grid: tiles of one head are neighbours, then heads, then sequences.
struct Place {
  int tile, head, batch;
  __device__ __forceinline__ Place(int tiles, int heads) {
    const int index = blockIdx.x;
    tile = index % tiles;
    head = index / tiles % heads;
    batch = index / tiles / heads;
  }
};

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace fastattn
