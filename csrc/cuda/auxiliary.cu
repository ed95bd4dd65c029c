#include "auxiliary.h"
#include "sm80/element.h"
#include "sm80/sequence.h"

namespace fastattn {
namespace {

constexpr int kThreads = 256;

int blocks_for(int64_t threads) {
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  return int(blocks < (1 << 20) ? blocks : (1 << 20));  // kernels stride over what is left
}
__device__ __forceinline__ int64_t thread_index() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t thread_count() { return int64_t(gridDim.x) * kThreads; }

__device__ __forceinline__ float warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    pack(TensorArg from, Unit* to, int64_t count, int64_t heads, int64_t rows, int dim, int padded) {
  for (int64_t index = thread_index(); index < count; index += thread_count()) {
    const int64_t col = index % padded, row = index / padded % rows, rest = index / padded / rows;
    const Unit* source = static_cast<const Unit*>(from.data) + rest / heads * from.stride_b +
                         rest % heads * from.stride_h + row * from.stride_n;
    to[index] = col < dim ? source[col] : Unit(0);
  }
}

template <typename Unit>
__global__ void __launch_bounds__(kThreads)
    fill_rest(const __grid_constant__ Params p, TensorArg x, bool queries, int heads, int dim, Unit outside) {
  const int32_t* cu = queries ? p.cu_q : p.cu_k;
  const int64_t total = queries ? p.total_q : p.total_k;
  const auto fill = [&](int64_t index, int64_t first, Unit value) {
    const int64_t col = index % dim, head = index / dim % heads, row = first + index / dim / heads;
    static_cast<Unit*>(x.data)[head * x.stride_h + row * x.stride_n + col] = value;
  };
  const int64_t begin = max(int64_t(0), min(int64_t(cu[0]), total));
  const int64_t end = max(begin, min(int64_t(cu[p.batch]), total));
  const int64_t before = begin * heads * dim, count = before + (total - end) * heads * dim;
  for (int64_t index = thread_index(); index < count; index += thread_count())
    fill(index < before ? index : index - before, index < before ? 0 : end, outside);

  constexpr Unit kNan = Unit(~Unit(0)) >> 1;
  for (int b = blockIdx.x; b < p.batch; b += gridDim.x) {
    int64_t first_q, first_k;
    const int64_t rows_q = Sequence::extent(p.cu_q, b, p.total_q, first_q);
    const int64_t rows_k = Sequence::extent(p.cu_k, b, p.total_k, first_k);
    if (rows_q <= p.len_q && rows_k <= p.len_k) continue;
    for (int64_t index = threadIdx.x; index < (queries ? rows_q : rows_k) * heads * dim; index += kThreads)
      fill(index, queries ? first_q : first_k, kNan);
  }
}

// A warp a row. In the packed layout the rows of all sequences are one.
template <typename T>
__global__ void __launch_bounds__(kThreads) row_statistics_kernel(const __grid_constant__ Params p) {
  const int64_t rows = p.cu_q != nullptr ? p.total_q : p.len_q, batch = p.cu_q != nullptr ? 1 : p.batch;
  const int lane = threadIdx.x % 32;
  const float kept = float(65536 - p.dropout_threshold) / 65536.0f;  // 1 / dropout_scale
  for (int64_t index = thread_index() / 32; index < batch * p.heads * rows; index += thread_count() / 32) {
    const int64_t i = index % rows, h = index / rows % p.heads, b = index / rows / p.heads;
    const T* out =
        static_cast<const T*>(p.out.data) + b * p.out.stride_b + h * p.out.stride_h + i * p.out.stride_n;
    const T* dout =
        static_cast<const T*>(p.dout.data) + b * p.dout.stride_b + h * p.dout.stride_h + i * p.dout.stride_n;
    float sum = 0.0f;
    for (int col = lane; col < p.dim_v; col += 32)
      sum = fmaf(Element<T>::to_float(out[col]), Element<T>::to_float(dout[col]), sum);
    sum = warp_sum(sum);
    if (lane != 0) continue;
    const float lse = p.lse.data[b * p.lse.stride_b + h * p.lse.stride_h + i];
    const float dlse =
        p.dlse.data == nullptr ? 0.0f : p.dlse.data[b * p.dlse.stride_b + h * p.dlse.stride_h + i];
    const bool empty = lse == -INFINITY;
    p.rows[b * p.rows_stride_b + h * p.rows_stride_h + i] =
        RowStatistics{empty ? INFINITY : lse * kLog2E, empty ? 0.0f : (dlse - sum) * kept};
  }
}

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 2) {
    return T{uint16_t(Element<T>::pack(x, 0.0f))};
  } else {
    return x;
  }
}

// A warp a row.
template <typename T>
__global__ void __launch_bounds__(kThreads) combine(const __grid_constant__ Params p) {
  const int lane = threadIdx.x % 32;
  const int64_t rows = int64_t(p.batch) * p.heads * p.len_q;
  for (int64_t index = thread_index() / 32; index < rows; index += thread_count() / 32) {
    const int i = int(index % p.len_q), h = int(index / p.len_q % p.heads),
              b = int(index / p.len_q / p.heads);
    const Sequence s(p, b);
    if (i >= s.len_q) continue;
    float highest = -INFINITY, total = 0.0f;
    for (int split = 0; split < p.splits; ++split)
      highest = fmaxf(highest, p.partial_lse[split * rows + index]);
    const float base = highest == -INFINITY ? 0.0f : highest;
    for (int split = 0; split < p.splits; ++split)
      total += ptx::exp2((p.partial_lse[split * rows + index] - base) * kLog2E);
    T* out = static_cast<T*>(p.out.data) + b * p.out.stride_b + h * p.out.stride_h +
             (s.first_q + i) * p.out.stride_n;
    for (int col = lane; col < p.dim_v; col += 32) {
      float sum = 0.0f;
      for (int split = 0; split < p.splits; ++split) {
        const float lse = p.partial_lse[split * rows + index];
        if (lse == -INFINITY) continue;
        sum = fmaf(p.partial_out[(split * rows + index) * p.dim_v + col], ptx::exp2((lse - base) * kLog2E),
                   sum);
      }
      // An exact division is a call; `total` lies in [1, splits], where this one is within 2 ulp.
      out[col] = from_float<T>(total > 0.0f ? __fdividef(sum, total) : total == 0.0f ? 0.0f : total);
    }
    if (lane == 0 && p.lse.data != nullptr)
      row_pointer(p.lse, s, h)[i] = highest == -INFINITY ? -INFINITY : highest + ptx::log2(total) * kLn2;
  }
}

__global__ void __launch_bounds__(kThreads) finish_relative_bias(const __grid_constant__ Params p) {
  const int side = p.diagonal_tile;
  const int64_t length = int64_t(p.len_q) + p.len_k - 1;
  const int q_tiles = ceil_div(p.len_q, side);
  for (int64_t index = thread_index(); index < length * p.heads; index += thread_count()) {
    const int64_t entry = index % length, head = index / length;
    const int64_t offset = entry - (p.len_q - 1) + int64_t(q_tiles) * side;  // j - i, made positive
    float sum = 0.0f;
    for (int64_t tile = offset / side - 1; tile <= offset / side; ++tile) {
      const int64_t diagonal = tile;  // (k tile - q tile) + q_tiles - 1
      const int64_t d = offset - (diagonal + 1) * side + side - 1;
      if (diagonal >= 0 && diagonal < p.diagonals && d >= 0 && d < 2 * side - 1)
        sum += p.drelative_partial[(head * p.diagonals + diagonal) * 2 * side + d];
    }
    p.drelative_bias[head * p.drelative_bias_stride_h + entry] = sum;
  }
}

}  // namespace

cudaError_t launch_pack(const TensorArg& from, void* to, int element_bytes, int64_t batch, int64_t heads,
                        int64_t rows, int dim, int padded, cudaStream_t stream) {
  const int64_t count = batch * heads * rows * padded;
  if (count == 0) return cudaSuccess;
  if (element_bytes == 2) {
    pack<<<blocks_for(count), kThreads, 0, stream>>>(from, static_cast<uint16_t*>(to), count, heads, rows,
                                                     dim, padded);
  } else {
    pack<<<blocks_for(count), kThreads, 0, stream>>>(from, static_cast<uint32_t*>(to), count, heads, rows,
                                                     dim, padded);
  }
  return cudaGetLastError();
}

cudaError_t launch_fill_rest(const Params& p, const TensorArg& x, bool queries, int heads, int dim,
                             int element_bytes, uint32_t outside, cudaStream_t stream) {
  const int64_t count = (queries ? p.total_q : p.total_k) * heads * dim;
  if (count == 0) return cudaSuccess;
  const int blocks = min(blocks_for(count), 256);  // there is seldom something to do
  if (element_bytes == 2) {
    fill_rest<<<blocks, kThreads, 0, stream>>>(p, x, queries, heads, dim, uint16_t(outside));
  } else {
    fill_rest<<<blocks, kThreads, 0, stream>>>(p, x, queries, heads, dim, outside);
  }
  return cudaGetLastError();
}

cudaError_t launch_row_statistics(const Params& p, int dtype, cudaStream_t stream) {
  const int64_t rows = p.heads * (p.cu_q != nullptr ? p.total_q : int64_t(p.batch) * p.len_q);
  if (rows == 0) return cudaSuccess;
  const int blocks = blocks_for(rows * 32);
  if (dtype == 0) row_statistics_kernel<float><<<blocks, kThreads, 0, stream>>>(p);
  if (dtype == 1) row_statistics_kernel<Half><<<blocks, kThreads, 0, stream>>>(p);
  if (dtype == 2) row_statistics_kernel<BFloat16><<<blocks, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_combine(const Params& p, int dtype, cudaStream_t stream) {
  const int64_t rows = int64_t(p.batch) * p.heads * p.len_q;
  if (rows == 0) return cudaSuccess;
  const int blocks = blocks_for(rows * 32);
  if (dtype == 0) combine<float><<<blocks, kThreads, 0, stream>>>(p);
  if (dtype == 1) combine<Half><<<blocks, kThreads, 0, stream>>>(p);
  if (dtype == 2) combine<BFloat16><<<blocks, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_finish_relative_bias(const Params& p, cudaStream_t stream) {
  const int64_t count = (int64_t(p.len_q) + p.len_k - 1) * p.heads;
  if (count <= 0) return cudaSuccess;
  finish_relative_bias<<<blocks_for(count), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace fastattn
