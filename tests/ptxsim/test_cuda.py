"""Kernels as nvcc compiles them."""

import numpy as np
import pytest

from . import In, Out, RaceFault, Struct, compile_cuda, run_ptx, why_no_nvcc

pytestmark = pytest.mark.skipif(bool(why_no_nvcc()), reason=str(why_no_nvcc()))
RNG = np.random.default_rng()

SOURCE = r"""
#include <cuda_fp16.h>
#include <cstdint>
extern "C" __global__ void add(const float* a, const float* b, float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + b[i];
}
struct Params { const half* x; float* top; float* total; int n; float scale; };
extern "C" __global__ void __launch_bounds__(128) reduce(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) half tile[];
  __shared__ float partial[4];
  const int t = threadIdx.x;
  const uint32_t base = (uint32_t)__cvta_generic_to_shared(tile);
  for (int i = t; i < 512; i += 128) {
    int ok = i * 8 < p.n;
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16; }"
                 :: "r"(base + 16 * i), "l"(p.x + 8 * i), "r"(ok));
  }
  asm volatile("cp.async.commit_group; cp.async.wait_group 0;");
  __syncthreads();
  float m = -INFINITY, sum = 0;
  for (int i = t; i < p.n; i += 128) {
    float v = __half2float(tile[i]) * p.scale;
    m = fmaxf(m, v);
    sum += expf(v) + v / 7.f;
  }
  for (int o = 16; o; o >>= 1) m = fmaxf(m, __shfl_xor_sync(~0u, m, o));
  if (t % 32 == 0) partial[t / 32] = m;
  __syncthreads();
  if (t == 0) *p.top = fmaxf(fmaxf(partial[0], partial[1]), fmaxf(partial[2], partial[3]));
  atomicAdd(p.total, sum);
}
"""


@pytest.fixture(scope="module")
def ptx():
    return compile_cuda(SOURCE)


def test_add(ptx):
    a, b, c = (
        RNG.standard_normal(300).astype(np.float32),
        RNG.standard_normal(300).astype(np.float32),
        np.zeros(300, np.float32),
    )
    run_ptx(ptx, "add", grid=3, block=128, args=[In(a), In(b), Out(c), 300])
    np.testing.assert_array_equal(c, a + b)


def test_reduction_with_a_struct_inline_assembly_and_both_kinds_of_shared_memory(ptx):
    x = RNG.standard_normal(3000).astype(np.float16)
    top, total = np.zeros(1, np.float32), np.zeros(1, np.float32)
    p = Struct((None, In(x)), (None, Out(top)), (None, total), ("i", 3000), ("f", 0.5))
    call = dict(kernel="reduce", grid=1, block=128, args=[p], shared=8192)
    run_ptx(ptx, **call)
    v = x.astype(np.float64) * 0.5
    assert top[0] == v.max()
    np.testing.assert_allclose(total[0], (np.exp(v) + v / 7).sum(), rtol=1e-5)
    with pytest.raises(RaceFault):
        run_ptx(ptx.replace("bar.sync", "// bar.sync"), **call)
