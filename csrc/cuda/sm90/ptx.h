// Every line of inline PTX that the sm_90a kernels add to sm80/ptx.h, behind small named functions. Each
// names the section of the PTX ISA manual (version 9.0) that defines the instruction.
#pragma once

#include <stdint.h>

#include "../sm80/element.h"

namespace fastattn::ptx {

// Parallel Synchronization: mbarrier.init. The barrier's phase completes after `count` arrivals.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Parallel Synchronization: fence.mbarrier_init. Makes initialised barriers visible to
// the copies that will arrive on them.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Memory Consistency: fence.proxy.async. Ordinary writes to shared memory become visible to wgmma and to bulk
// copies.
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Parallel Synchronization: mbarrier.arrive.
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Parallel Synchronization: mbarrier.arrive.expect_tx. The phase also waits for `bytes` of copies.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Parallel Synchronization: mbarrier.try_wait.parity. Returns once the phase of this parity is complete.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@!complete bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Parallel Synchronization: bar.sync and bar.arrive with a barrier's number and a thread count.
__device__ __forceinline__ void named_barrier_sync(uint32_t name, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(uint32_t name, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// Data Movement, Tensor copy: cp.async.bulk.tensor. The box of `map` at these coordinates, innermost first;
// elements outside of the tensor are zero. Arrives on `barrier`.
__device__ __forceinline__ void tensor_load_4d(uint32_t shared, const void* map, uint32_t barrier, int c0,
                                               int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// Miscellaneous: setmaxnreg. A warpgroup gives registers back, or takes more.
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void acquire_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Asynchronous Warpgroup Level Matrix Instructions: wgmma.fence, commit_group, wait_group.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Accumulators: the compiler may not move uses of them over this point.
template <int kTiles>
__device__ __forceinline__ void pin(float (&d)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
    asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}

// Asynchronous Warpgroup Level Matrix Instructions: wgmma.mma_async, m64 x n x k16, fp32 accumulators.
//
// Wgmma<T, n / 8>::rows    d = a b^T, or d += a b^T: both in shared memory, by descriptors, their rows along
// k
//                ::sum     d += a b: a in registers, the rows of b run along n
// A lane's accumulators d[i] are laid out like those of mma.m16n8k16, warp w of the four on rows 16 w..
// of 64.
template <typename T, int kTiles>
struct Wgmma;

#define REGISTERS_32                                                                                      \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, "                                                                                                 \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64                                                                                       \
  REGISTERS_32                                                                                             \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, "                                                                                                  \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_128                                                                                      \
  REGISTERS_64                                                                                             \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
  "%84, "                                                                                                  \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, "    \
  "%104, "                                                                                                 \
  "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, " \
  "%122, %123, %124, %125, %126, %127"
#define OPERANDS_4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define OPERANDS_16(i) OPERANDS_4(i), OPERANDS_4(i + 1), OPERANDS_4(i + 2), OPERANDS_4(i + 3)
#define OPERANDS_32 OPERANDS_16(0), OPERANDS_16(4)
#define OPERANDS_64 OPERANDS_32, OPERANDS_16(8), OPERANDS_16(12)
#define OPERANDS_128 OPERANDS_64, OPERANDS_16(16), OPERANDS_16(20), OPERANDS_16(24), OPERANDS_16(28)

// P0..P4: the numbers of the operands that follow the accumulators.
#define DEFINE_WGMMA(T, TYPE, N, COUNT, P0, P1, P2, P3, P4)                                              \
  template <>                                                                                            \
  struct Wgmma<T, N / 8> {                                                                               \
    __device__ __forceinline__ static void rows(float (&d)[N / 8][4], uint64_t a, uint64_t b, int add) { \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " P2                                            \
                   ", 0;\n"                                                                              \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " REGISTERS_##COUNT \
                   "}, " P0 ", " P1 ", add, 1, 1, 0, 0;\n}"                                              \
                   : OPERANDS_##COUNT                                                                    \
                   : "l"(a), "l"(b), "r"(add));                                                          \
    }                                                                                                    \
    __device__ __forceinline__ static void sum(float (&d)[N / 8][4], const Operand& a, uint64_t b) {     \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " REGISTERS_##COUNT \
                   "}, {" P0 ", " P1 ", " P2 ", " P3 "}, " P4 ", 1, 1, 1, 1;"                            \
                   : OPERANDS_##COUNT                                                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                \
    }                                                                                                    \
  }

DEFINE_WGMMA(Half, "f16", 64, 32, "%32", "%33", "%34", "%35", "%36");
DEFINE_WGMMA(BFloat16, "bf16", 64, 32, "%32", "%33", "%34", "%35", "%36");
DEFINE_WGMMA(Half, "f16", 128, 64, "%64", "%65", "%66", "%67", "%68");
DEFINE_WGMMA(BFloat16, "bf16", 128, 64, "%64", "%65", "%66", "%67", "%68");
DEFINE_WGMMA(Half, "f16", 256, 128, "%128", "%129", "%130", "%131", "%132");
DEFINE_WGMMA(BFloat16, "bf16", 256, 128, "%128", "%129", "%130", "%131", "%132");

#undef REGISTERS_32
#undef REGISTERS_64
#undef REGISTERS_128
#undef OPERANDS_4
#undef OPERANDS_16
#undef OPERANDS_32
#undef OPERANDS_64
#undef OPERANDS_128
#undef DEFINE_WGMMA

}  // namespace fastattn::ptx
