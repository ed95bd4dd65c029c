#include "launch.h"

namespace fastattn::sm90 {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                            CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

fastattn_status find_encoder(Encode& encode) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error =
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess) return check_cuda(error, "asking for cuTensorMapEncodeTiled");
  if (found != cudaDriverEntryPointSuccess || function == nullptr)
    return fail(FASTATTN_DEVICE_ERROR,
                "this driver has no cuTensorMapEncodeTiled; it is older than CUDA 12.");
  encode = reinterpret_cast<Encode>(function);
  return FASTATTN_OK;
}

// Boxes of block_rows x kBoxCols. Without rows there is nothing to load, but a map must be there: one row of
// some memory that exists.
fastattn_status encode(Encode encoder, const Params& p, const TensorArg& tensor, int heads, int64_t rows,
                       int cols, int block_rows, const void* some_memory, TensorMap& x) {
  const bool empty = tensor.data == nullptr || rows == 0;
  const int64_t batch = p.cu_q != nullptr ? 1 : p.batch, bytes = 2;
  x.head_step = !empty && heads > 1 && tensor.stride_h != 0;
  x.batch_step = !empty && batch > 1 && tensor.stride_b != 0;
  // Of an axis with a single index the stride is never used; it must be valid nonetheless.
  const cuuint64_t some_stride = 16 * ((cols * bytes + 15) / 16);
  const cuuint64_t sizes[4] = {cuuint64_t(cols), cuuint64_t(empty ? 1 : rows),
                               cuuint64_t(x.head_step ? heads : 1), cuuint64_t(x.batch_step ? batch : 1)};
  const cuuint64_t strides[3] = {sizes[1] > 1 ? cuuint64_t(tensor.stride_n * bytes) : some_stride,
                                 x.head_step ? cuuint64_t(tensor.stride_h * bytes) : some_stride,
                                 x.batch_step ? cuuint64_t(tensor.stride_b * bytes) : some_stride};
  const cuuint32_t box[4] = {kBoxCols, cuuint32_t(block_rows), 1, 1}, every[4] = {1, 1, 1, 1};
  const CUresult result =
      encoder(&x.map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, empty ? const_cast<void*>(some_memory) : tensor.data,
              sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
              CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return FASTATTN_OK;
  return fail(FASTATTN_DEVICE_ERROR, "cuTensorMapEncodeTiled refused a tensor (error %d).", int(result));
}

}  // namespace

const KernelSet* find_kernels(const fastattn::KernelSet& set, int capability) {
  if (capability != 90 || set.features != 0) return nullptr;
  for (const KernelSet* const* at = kKernelSets; *at != nullptr; ++at)
    if ((*at)->dtype == set.dtype && (*at)->dim >= set.dim && 3 * (*at)->dim <= 4 * set.dim) return *at;
  return nullptr;
}

fastattn_status encode_maps(const Params& p, const Kernel& kernel, MappedParams& x) {
  Encode encoder = nullptr;
  fastattn_status status = find_encoder(encoder);
  const bool packed = p.cu_q != nullptr;
  const int64_t queries = packed ? p.total_q : p.len_q, keys = packed ? p.total_k : p.len_k;
  const struct {
    const TensorArg& tensor;
    int heads;
    int64_t rows;
    int cols, block_rows;
    TensorMap& map;
  } tensors[] = {{p.q, p.heads, queries, p.load_dim, kernel.block_q, x.q},
                 {p.k, p.kv_heads, keys, p.load_dim, kernel.block_k, x.k},
                 {p.v, p.kv_heads, keys, p.load_dim_v, kernel.block_k, x.v},
                 {p.dout, p.heads, queries, p.load_dim_v, kernel.block_q, x.dout}};
  for (const auto& t : tensors) {
    if (status != FASTATTN_OK) return status;
    status = encode(encoder, p, t.tensor, t.heads, t.rows, t.cols, t.block_rows, p.q.data, t.map);
  }
  x.params = p;
  return status;
}

}  // namespace fastattn::sm90
