"""Triton kernels that have nothing to do with the package under test: what the simulator is trusted by."""

import triton
import triton.language as tl


@triton.jit
def matmul(
    a_ptr, b_ptr, c_ptr, M, N, K, sa, sb, sc,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c = a @ b for row-major (M, K) and (K, N), any sizes."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        in_k = start + k < K
        a = tl.load(
            a_ptr + rows[:, None] * sa + (start + k)[None, :], (rows < M)[:, None] & in_k[None, :], 0.0
        )
        b = tl.load(
            b_ptr + (start + k)[:, None] * sb + columns[None, :], in_k[:, None] & (columns < N)[None, :], 0.0
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(c_ptr + rows[:, None] * sc + columns[None, :], total.to(c_ptr.dtype.element_ty), inside)


@triton.jit
def softmax(x_ptr, y_ptr, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + at, at < columns, -float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + row * stride + at, (e / tl.sum(e, 0)).to(y_ptr.dtype.element_ty), at < columns)


@triton.jit
def layer_norm(x_ptr, w_ptr, b_ptr, y_ptr, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    x = tl.load(x_ptr + row * columns + at, inside, 0.0).to(tl.float32)
    mean = tl.sum(x, 0) / columns
    centred = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / columns + eps)
    w = tl.load(w_ptr + at, inside, 0.0).to(tl.float32)
    b = tl.load(b_ptr + at, inside, 0.0).to(tl.float32)
    tl.store(y_ptr + row * columns + at, (centred * rstd * w + b).to(y_ptr.dtype.element_ty), inside)


@triton.jit
def attention(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, M, N, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A small flash-attention forward over (batch, M or N, D), contiguous; causal from the top left."""
    batch = tl.program_id(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    q = tl.load(q_ptr + (batch * M + rows)[:, None] * D + d[None, :], (rows < M)[:, None], 0.0)
    top = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    out = tl.zeros((BM, D), tl.float32)
    end = tl.minimum(N, (tl.program_id(0) + 1) * BM) if CAUSAL else N
    for start in range(0, end, BN):
        keys = start + tl.arange(0, BN)
        k = tl.load(k_ptr + (batch * N + keys)[:, None] * D + d[None, :], (keys < N)[:, None], 0.0)
        v = tl.load(v_ptr + (batch * N + keys)[:, None] * D + d[None, :], (keys < N)[:, None], 0.0)
        s = tl.dot(q, tl.trans(k)) * (scale * 1.4426950408889634)
        s = tl.where((keys < N)[None, :], s, -float("inf"))
        if CAUSAL:
            s = tl.where(rows[:, None] >= keys[None, :], s, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(top - new)
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None])
        top = new
    tl.store(lse_ptr + batch * M + rows, (top + tl.log2(total)) * 0.6931471805599453, rows < M)
    out = (out / total[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + (batch * M + rows)[:, None] * D + d[None, :], out, (rows < M)[:, None])


@triton.jit
def scan_and_count(x_ptr, y_ptr, histogram_ptr, n, BLOCK: tl.constexpr):
    """Prefix sums, a histogram by atomics, a sort: what else Triton lowers to warp instructions."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < n, 0)
    tl.store(y_ptr + at, tl.cumsum(x, 0), at < n)
    tl.store(y_ptr + n + at, tl.sort(tl.where(at < n, x, 1 << 30), 0), at < n)
    tl.atomic_add(histogram_ptr + x, 1, at < n)


@triton.jit
def outer_sum(x_ptr, y_ptr, n, BM: tl.constexpr, BN: tl.constexpr):
    """Column sums accumulated over blocks by floating-point atomics, as a split backward does."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.arange(0, BN)
    x = tl.load(x_ptr + rows[:, None] * BN + columns[None, :], (rows < n)[:, None], 0.0)
    tl.atomic_add(y_ptr + columns, tl.sum(x, 0))


@triton.jit
def copy_by_descriptor(x_ptr, y_ptr, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """A device-made tensor descriptor: TMA on sm_90, ordinary loads before."""
    x = tl.make_tensor_descriptor(x_ptr, (M, N), (N, 1), (BM, BN))
    y = tl.make_tensor_descriptor(y_ptr, (M, N), (N, 1), (BM, BN))
    at = [tl.program_id(0) * BM, tl.program_id(1) * BN]
    y.store(at, x.load(at) + 1.0)
