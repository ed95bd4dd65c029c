// One grow-only workspace per thread, freed when the thread ends, and the buffers that threads share.
#include <stdlib.h>
#include <string.h>

#include "internal.h"

namespace fastattn {
namespace {

struct ThreadWorkspace {
  void* data = nullptr;
  size_t size = 0;
  ~ThreadWorkspace() { free(data); }
};

thread_local ThreadWorkspace workspace;

// In the builds that tests use all memory holds NaN at first (0xff in every byte, in each dtype), so that a
// result which a byte of an earlier call has reached cannot look right.
void poison([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(FASTATTN_POISON)
  if (data != nullptr) memset(data, 0xff, bytes);
#endif
}

}  // namespace

float* allocate_sums(int64_t count) {
  const size_t bytes = (size_t)count * sizeof(float);
  float* const sums = (float*)malloc(bytes);
  poison(sums, bytes);
  return sums;
}

void* thread_workspace(size_t bytes) {
  if (bytes > workspace.size || workspace.data == nullptr) {
    free(workspace.data);
    workspace.size = 0;
    void* data = nullptr;
    const size_t rounded = (bytes + 4095) / 4096 * 4096 + 4096;
    if (posix_memalign(&data, 64, rounded) != 0) data = nullptr;
    workspace.data = data;
    if (data != nullptr) workspace.size = rounded;
  }
  poison(workspace.data, workspace.size);
  return workspace.data;
}

}  // namespace fastattn
