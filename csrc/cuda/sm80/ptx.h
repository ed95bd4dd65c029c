// Every line of inline PTX in the sm_80 kernels, behind small named functions. Each names the section of
// the PTX ISA manual (version 9.0) that defines the instruction.
#pragma once

#include <stdint.h>

namespace fastattn::ptx {

// Address Space: cvta. The 32-bit shared-window address that ldmatrix, cp.async and st.shared take.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Not an instruction: the value is known from here on only. What follows from it is computed here rather than
// kept in registers since before a loop; the value itself is not computed anew at each use.
__device__ __forceinline__ void pin(int& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void pin(int64_t& x) { asm volatile("" : "+l"(x)); }

// Data Movement: shfl.sync. A value that all lanes have, known to ptxas to be one: what is computed from it,
// and control flow that depends on it, then takes uniform registers and branches.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// Data Movement: shfl.sync, from each lane to itself. Like pin, but known to be new to ptxas too, which moves
// what follows from a pinned value out of a loop again. So does uniform, of what all lanes have.
__device__ __forceinline__ int again(int x) { return __shfl_xor_sync(0xffffffffu, x, 0); }

// Integer Arithmetic Instructions: mad.wide. pointer + kRows * stride in one instruction, not hoisted out of
// loops, where it would be two and more registers.
template <int kRows, typename T>
__device__ __forceinline__ T* advance(T* pointer, int stride) {
  T* result;
  asm volatile("mad.wide.s32 %0, %1, %2, %3;"
               : "=l"(result)
               : "r"(stride), "n"(kRows * int(sizeof(T))), "l"(pointer));
  return result;
}

// Data Movement, Non-bulk copy: cp.async with the ignore-src operand. Copies 16 bytes, or writes 16 zero
// bytes when not `inside`; .cg bypasses L1.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, bool inside) {
  asm volatile(
      "{\n"
      ".reg .pred ignore;\n"
      "setp.eq.s32 ignore, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, ignore;\n"
      "}" ::"r"(shared),
      "l"(global), "r"(int(inside))
      : "memory");
}

// The same for 4 bytes (.ca is the only cache operator for sizes below 16).
__device__ __forceinline__ void cp_async_4(uint32_t shared, const void* global, bool inside) {
  asm volatile(
      "{\n"
      ".reg .pred ignore;\n"
      "setp.eq.s32 ignore, %2, 0;\n"
      "cp.async.ca.shared.global [%0], [%1], 4, ignore;\n"
      "}" ::"r"(shared),
      "l"(global), "r"(int(inside))
      : "memory");
}

// Data Movement, Non-bulk copy: cp.async.commit_group and cp.async.wait_group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Warp Level Matrix Instructions: ldmatrix. Four 8x8 b16 matrices; lane l gives the address of row l % 8 of
// matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

// Data Movement: ld.shared and st.shared.
__device__ __forceinline__ uint32_t load_shared_32(uint32_t shared) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(shared) : "memory");
  return value;
}
__device__ __forceinline__ int64_t load_shared_s64(uint32_t shared) {
  int64_t value;
  asm volatile("ld.shared.s64 %0, [%1];" : "=l"(value) : "r"(shared) : "memory");
  return value;
}
__device__ __forceinline__ uint4 load_shared_128(uint32_t shared) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared)
               : "memory");
  return v;
}
__device__ __forceinline__ uint16_t load_shared_16(uint32_t shared) {
  uint16_t value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(shared) : "memory");
  return value;
}
__device__ __forceinline__ void store_shared_16(uint32_t shared, uint16_t value) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(shared), "h"(value) : "memory");
}
__device__ __forceinline__ void store_shared_32(uint32_t shared, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared), "r"(value) : "memory");
}
__device__ __forceinline__ void store_shared_64(uint32_t shared, uint32_t lo, uint32_t hi) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(shared), "r"(lo), "r"(hi) : "memory");
}

__device__ __forceinline__ void store_shared_128(uint32_t shared, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// Data Movement: st.global. nvcc makes four stores of a uint4's assignment.
__device__ __forceinline__ void store_global_128(void* global, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

// Warp Level Matrix Instructions: mma.m16n8k16 with .f16 operands and an .f32 accumulator.
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with .bf16 operands.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Warp Level Matrix Instructions: mma.m16n8k8 with .tf32 operands and an .f32 accumulator.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Floating Point Instructions: ex2.approx. 2 ulp, exact at integers and infinities.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Floating Point Instructions: lg2.approx.
__device__ __forceinline__ float log2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Data Movement and Conversion: cvt. Two fp32 values rounded to one register, `lo` in the low half.
__device__ __forceinline__ uint32_t pack_f16(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
__device__ __forceinline__ uint32_t pack_bf16(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
__device__ __forceinline__ float from_f16(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

// Data Movement and Conversion: cvt.rna.tf32. The 19 leading bits of an fp32 value, rounded to nearest.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

}  // namespace fastattn::ptx
