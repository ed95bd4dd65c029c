// The part of the CUDA runtime that libfastattn_cuda calls, for a machine without a driver: kernels are known
// by their names, and a launch is handed to the test that loaded the library.
#include <cuda_runtime_api.h>

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
}  // namespace

EXPORT void fake_cudart_on_launch(Launch callback) { launch_callback = callback; }

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
  return value <= 99 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  const auto kernel = kernels().find(function);
  const int limit = shared_limit.count(function) ? shared_limit[function] : 48 * 1024;
  if (kernel == kernels().end() || launch_callback == nullptr) return last = cudaErrorInvalidDeviceFunction;
  if (grid.x == 0 || grid.y != 1 || grid.z != 1 || block.y != 1 || block.z != 1 ||
      shared_bytes > size_t(limit))
    return last = cudaErrorInvalidConfiguration;
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
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? 8
           : attribute == cudaDevAttrComputeCapabilityMinor ? 0
                                                            : 108;
  return cudaSuccess;
}
}
