// One grow-only workspace per thread, freed when the thread ends.
#include <stdlib.h>

#include "kernels.h"

namespace fastattn {
namespace {

struct ThreadWorkspace {
  void* data = nullptr;
  size_t size = 0;
  ~ThreadWorkspace() { free(data); }
};

thread_local ThreadWorkspace workspace;

}  // namespace

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
  return workspace.data;
}

}  // namespace fastattn
