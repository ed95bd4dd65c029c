// The part of the CUDA runtime that libfastattn_cuda calls, for a machine without a driver: kernels are known
// by their names, and a launch is handed to the test that loaded the library.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <string.h>

#include <map>
#include <string>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {
std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}
using Launch = int (*)(const char* kernel, unsigned grid, unsigned block, unsigned shared_bytes,
                       void** arguments);
Launch launch_callback = nullptr;
cudaError_t last = cudaSuccess;
struct {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
} configuration;
std::map<const void*, int> shared_limit;
int capability = 80;
cudaStream_t launch_stream = nullptr;
std::string refused;  // the function that fails next, and until another is named

cudaError_t answer(const char* function) { return refused == function ? cudaErrorInvalidValue : cudaSuccess; }

// cuTensorMapEncodeTiled, with the refusals of its documentation. The 128 bytes are laid out as
// tests/ptxsim/tensormap.py reads them, which is not the hardware's way.
CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  bool good = reinterpret_cast<uintptr_t>(map) % 64 == 0 && reinterpret_cast<uintptr_t>(address) % 16 == 0 &&
              address != nullptr && type == CU_TENSOR_MAP_DATA_TYPE_UINT16 && rank >= 1 && rank <= 5 &&
              box[0] * 2 % 16 == 0 && (swizzle != CU_TENSOR_MAP_SWIZZLE_128B || box[0] * 2 <= 128);
  for (cuuint32_t i = 0; i < rank; ++i) {
    good = good && sizes[i] >= 1 && sizes[i] <= (1ull << 32) && box[i] >= 1 && box[i] <= 256 &&
           element_strides[i] == 1;
    if (i > 0) good = good && strides[i - 1] % 16 == 0 && strides[i - 1] > 0 && strides[i - 1] < (1ull << 40);
  }
  if (!good || refused == "cuTensorMapEncodeTiled") return CUDA_ERROR_INVALID_VALUE;
  struct {
    uint64_t address;
    uint32_t rank, type, interleave, swizzle, fill, atomicity, sizes[5], padding;
    uint64_t strides[4];
    uint32_t box[5], element_strides[5];
  } fields = {};
  static_assert(sizeof fields == 128);
  fields.address = reinterpret_cast<uint64_t>(address), fields.rank = rank - 1, fields.type = type;
  fields.interleave = interleave, fields.swizzle = swizzle, fields.fill = fill;
  for (cuuint32_t i = 0; i < rank; ++i) {
    fields.sizes[i] = uint32_t(sizes[i]), fields.box[i] = box[i];
    fields.element_strides[i] = element_strides[i];
    if (i > 0) fields.strides[i - 1] = strides[i - 1];
  }
  memcpy(map, &fields, sizeof fields);
  return CUDA_SUCCESS;
}
}  // namespace

EXPORT void fake_cudart_on_launch(Launch callback) { launch_callback = callback; }
EXPORT void fake_cudart_set_capability(int value) { capability = value; }
EXPORT void* fake_cudart_launch_stream(void) { return launch_stream; }
EXPORT void fake_cudart_refuse(const char* function) { refused = function; }

extern "C" {
void** __cudaRegisterFatBinary(void*) { return new void*; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
  kernels()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream) {
  configuration = {grid, block, shared_bytes, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  *grid = configuration.grid, *block = configuration.block, *shared_bytes = configuration.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) shared_limit[function] = value;
  return value <= (capability == 90 ? 227 : 99) * 1024 ? answer("cudaFuncSetAttribute")
                                                       : cudaErrorInvalidValue;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t stream) {
  const auto kernel = kernels().find(function);
  const int limit = shared_limit.count(function) ? shared_limit[function] : 48 * 1024;
  if (kernel == kernels().end() || launch_callback == nullptr) return last = cudaErrorInvalidDeviceFunction;
  if (grid.x == 0 || grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1 ||
      shared_bytes > size_t(limit))
    return last = cudaErrorInvalidConfiguration;
  launch_stream = stream;
  const int failed =
      launch_callback(kernel->second.c_str(), grid.x, block.x, unsigned(shared_bytes), arguments);
  return last = failed ? cudaErrorLaunchFailure : cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared_bytes, cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared_bytes,
                          stream);
}
cudaError_t cudaGetLastError(void) {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t) { return "refused by the simulated device"; }
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "launch failure" : "error";
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? capability / 10
           : attribute == cudaDevAttrComputeCapabilityMinor ? capability % 10
                                                            : 108;
  return answer("cudaDeviceGetAttribute");
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return answer("cudaGetDevice");
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long, cudaDriverEntryPointQueryResult* found) {
  const bool known = strcmp(symbol, "cuTensorMapEncodeTiled") == 0 && refused != "an old driver";
  *function = known ? reinterpret_cast<void*>(encode_tiled) : nullptr;
  if (found != nullptr) *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return answer("cudaGetDriverEntryPointByVersion");
}
}
