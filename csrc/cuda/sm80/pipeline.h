// Tiles arrive in shared memory while earlier ones are used. With two stages the copy of step n + 1 is under
// way during step n, and one barrier a step both publishes the tiles of n and frees those of n - 1. One stage
// loads and waits.
#pragma once

#include "ptx.h"

namespace fastattn {

template <int kStages>
struct Pipeline {
  static_assert(kStages == 1 || kStages == 2);

  // Before the first step: the tiles of step 0, and whatever else the block needs.
  template <typename Load>
  __device__ __forceinline__ static void start(int count, Load load) {
    if (count > 0) load(0, 0);
    ptx::cp_async_commit();
  }

  // Begins step `step` of `count`: its tiles are there, and load(step + 1) is on its way. Returns the stage.
  template <typename Load>
  __device__ __forceinline__ static int begin(int step, int count, Load load) {
    if (kStages == 1 && step > 0) {
      __syncthreads();
      load(step, 0);
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (kStages == 2 && step + 1 < count) {
      load(step + 1, (step + 1) % 2);
      ptx::cp_async_commit();
    }
    return kStages == 2 ? step % 2 : 0;
  }
};

}  // namespace fastattn
