// Tiles arrive in shared memory while earlier ones are used. With two stages the copy of step n + 1 is under
// way during step n, and one barrier a step both publishes the tiles of n and frees those of n - 1. One stage
// loads and waits.
#pragma once

#include <type_traits>

#include "ptx.h"

namespace fastattn {

// How far apart stages are: by a power of two the stage is a bit of the step's number, and ptxas keeps
// addresses that differ by it in uniform registers.
constexpr int stage_bytes(int content) {
  int bytes = 128;
  while (bytes < content) bytes *= 2;
  return bytes;
}

template <int kStages>
struct Pipeline {
  static_assert(kStages == 1 || kStages == 2);

  // load(step, stage, next) copies the tiles of a step to a stage. `next` is a std::bool_constant: whether
  // those of the step before were copied last, and both steps are unmasked.

  // Before the first step: the tiles of step 0, and whatever else the block needs.
  template <typename Load>
  __device__ __forceinline__ static void start(int count, Load load) {
    if (count > 0) load(0, 0, std::false_type{});
    ptx::cp_async_commit();
  }

  // Begins step `step` of `count`: its tiles are there, and those of the next are on their way. Returns the
  // stage. `unmasked` is a std::bool_constant: the step is, and with it all that follow.
  template <typename Unmasked, typename Load>
  __device__ __forceinline__ static int begin(int step, int count, Unmasked unmasked, Load load) {
    if (kStages == 1 && step > 0) {
      __syncthreads();
      load(step, 0, std::false_type{});
      ptx::cp_async_commit();
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (kStages == 2 && step + 1 < count) {
      load(step + 1, (step + 1) % 2, unmasked);
      ptx::cp_async_commit();
    }
    return kStages == 2 ? step % 2 : 0;
  }
};

}  // namespace fastattn
