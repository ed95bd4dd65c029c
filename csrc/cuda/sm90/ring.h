// Tiles arrive in a ring of shared-memory stages: one thread fills them, the consumers' warps empty them.
//
// A stage has two mbarriers. `full` completes a phase when the copy of a tile has arrived; `empty` when every
// consumer warp is done with it. Tile n takes stage n % kStages, in phase n / kStages.
#pragma once

#include "ptx.h"

namespace fastattn::sm90 {

template <int kStages_>
struct Ring {
  static constexpr int kStages = kStages_;
  static constexpr int kBytes = 2 * kStages * 8;
  uint32_t barriers;

  // `fillers`: how many arrivals fill a stage, besides the bytes.
  __device__ __forceinline__ void init(int consumer_warps, int fillers = 1) const {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::mbarrier_init(full(stage), fillers);
      ptx::mbarrier_init(empty(stage), consumer_warps);
    }
  }

  // The producer: waits until the stage of tile n is free; announces `bytes`, arrives and returns the barrier
  // to copy to; arrives.
  __device__ __forceinline__ void wait_free(int n) const { ptx::mbarrier_wait(empty(n), parity(n) ^ 1); }
  __device__ __forceinline__ uint32_t announce(int n, uint32_t bytes) const {
    ptx::mbarrier_arrive_expect(full(n), bytes);
    return full(n);
  }
  __device__ __forceinline__ void arrive(int n) const { ptx::mbarrier_arrive(full(n)); }

  // A consumer: waits for tile n; gives it back.
  __device__ __forceinline__ void wait(int n) const { ptx::mbarrier_wait(full(n), parity(n)); }
  __device__ __forceinline__ void release(int n) const {
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty(n));
  }

  __device__ __forceinline__ static int stage(int n) { return n % kStages; }

 private:
  __device__ __forceinline__ static uint32_t parity(int n) { return n / kStages & 1; }
  __device__ __forceinline__ uint32_t full(int n) const { return barriers + stage(n) * 8; }
  __device__ __forceinline__ uint32_t empty(int n) const { return barriers + (kStages + stage(n)) * 8; }
};

}  // namespace fastattn::sm90
