// What the host side shares: errors, the caller's workspace, checks and the table of kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "../fastattn.h"
#include "params.h"

namespace fastattn {

// Remembers the sentence for fastattn_last_error() and returns `status`.
fastattn_status fail(fastattn_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));
fastattn_status check_cuda(cudaError_t error, const char* what);

fastattn_status validate_forward(const fastattn_problem* p, const fastattn_forward_result* r);
fastattn_status validate_backward(const fastattn_problem* p, const fastattn_backward_io* io);
fastattn_status validate_problem(const fastattn_problem* p);

// Hands out pieces of the workspace in the order they are asked for. Without memory it only counts: the size
// queries and the calls run the same code.
class Workspace {
 public:
  Workspace() = default;
  Workspace(void* data, int64_t bytes) : data_(static_cast<char*>(data)), bytes_(bytes) {}
  void* take(int64_t bytes) {
    const int64_t at = used_;
    used_ += (bytes + 255) / 256 * 256;
    return data_ == nullptr || used_ > bytes_ ? nullptr : data_ + at;
  }
  int64_t used() const { return used_; }

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0, used_ = 0;
};

// A tensor that is not aligned for 16-byte loads, and the aligned copy of it that takes its place.
struct Copy {
  TensorArg from;
  void* to;
  int64_t batch, heads, rows;
  int dim, padded;
};

// All that a call launches, besides the kernels themselves.
struct Plan {
  Params params;
  Copy copies[4];
  int copy_count;
};

Plan plan_forward(const fastattn_problem& p, const fastattn_forward_result* r, int num_splits,
                  Workspace& workspace);
Plan plan_backward(const fastattn_problem& p, const fastattn_backward_io& io, int diagonal_tile,
                   Workspace& workspace);

// The kernels that serve a problem: the narrowest head dimension and the fewest features. Null after fail().
const KernelSet* find_kernels(const fastattn_problem& p);

extern const KernelSet* const kKernelSets[];  // ends with null; written by CMake from its table

constexpr int element_bytes(int dtype) { return dtype == FASTATTN_F32 ? 4 : 2; }
constexpr int64_t ceil_div64(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastattn
