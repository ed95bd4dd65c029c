"""Rotary positions of q and k, one kernel for both: see fastattn/rotary.py.

A program turns HEADS heads of q or k at BLOCK_N positions, so that angles are read once for several heads.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import Layout, alignment, layout, named_strides, strides
from .device import on_device
from .prepared import Launch
from .tiles import aligned, kernel

_HEADS = 4
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
_TILE = 1024  # elements of BLOCK_N halves: 8 for each of 128 threads


@kernel
def rotary_kernel(
    p_q,
    p_k,
    p_q_out,
    p_k_out,
    p_cos,
    p_sin,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_qob,
    stride_qoh,
    stride_qon,
    stride_kob,
    stride_koh,
    stride_kon,
    stride_cb,
    stride_cn,
    stride_sb,
    stride_sn,
    num_heads,
    num_kv_heads,
    seqlen,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    ALIGN: tl.constexpr,
    TABLE_ALIGN: tl.constexpr,
):
    i_b = tl.program_id(2).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_HALF)
    m_n = o_n < seqlen
    m_tile = m_n[:, None] & (o_d < HALF)[None, :]

    stride_cb, _, stride_cn = aligned(stride_cb, 0, stride_cn, TABLE_ALIGN)
    stride_sb, _, stride_sn = aligned(stride_sb, 0, stride_sn, TABLE_ALIGN)
    p_cos += i_b * stride_cb + o_n.to(tl.int64)[:, None] * stride_cn + o_d[None, :]
    p_sin += i_b * stride_sb + o_n.to(tl.int64)[:, None] * stride_sn + o_d[None, :]
    # [BLOCK_N, BLOCK_HALF] each: low' = low cos_low - high sin_low, high' = high cos_high + low sin_high
    b_cos_low = tl.load(p_cos, mask=m_tile, other=0.0).to(tl.float32)
    b_cos_high = tl.load(p_cos + HALF, mask=m_tile, other=0.0).to(tl.float32)
    b_sin_low = tl.load(p_sin, mask=m_tile, other=0.0).to(tl.float32)
    b_sin_high = tl.load(p_sin + HALF, mask=m_tile, other=0.0).to(tl.float32)
    if TRANSPOSED:
        b_sin_low, b_sin_high = -b_sin_high, -b_sin_low

    first = tl.program_id(1) * HEADS
    q_heads = tl.cdiv(num_heads, HEADS) * HEADS
    if first < q_heads:
        turn_heads(
            p_q, p_q_out, stride_qb, stride_qh, stride_qn, stride_qob, stride_qoh, stride_qon,
            i_b, first, num_heads, o_n, o_d, m_n, m_tile, b_cos_low, b_cos_high, b_sin_low, b_sin_high,
            HEAD_DIM, HALF, HEADS, BLOCK_HALF, ALIGN,
        )  # fmt: skip
    else:
        turn_heads(
            p_k, p_k_out, stride_kb, stride_kh, stride_kn, stride_kob, stride_koh, stride_kon,
            i_b, first - q_heads, num_kv_heads, o_n, o_d, m_n, m_tile,
            b_cos_low, b_cos_high, b_sin_low, b_sin_high,
            HEAD_DIM, HALF, HEADS, BLOCK_HALF, ALIGN,
        )  # fmt: skip


@triton.jit
def turn_heads(
    p_x,
    p_out,
    stride_b,
    stride_h,
    stride_n,
    stride_ob,
    stride_oh,
    stride_on,
    i_b,
    first,
    num_heads,
    o_n,
    o_d,
    m_n,
    m_tile,
    b_cos_low,
    b_cos_high,
    b_sin_low,
    b_sin_high,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Heads first to first + HEADS of one tensor."""
    stride_b, stride_h, stride_n = aligned(stride_b, stride_h, stride_n, ALIGN)
    stride_ob, stride_oh, stride_on = aligned(stride_ob, stride_oh, stride_on, ALIGN)
    o_in, o_out = o_n.to(tl.int64) * stride_n, o_n.to(tl.int64) * stride_on
    for i_h in tl.range(first, min(first + HEADS, num_heads)):
        p_in = p_x + i_b * stride_b + i_h * stride_h.to(tl.int64)
        p_to = p_out + i_b * stride_ob + i_h * stride_oh.to(tl.int64)
        p_low = p_in + (o_in[:, None] + o_d[None, :])
        b_low = tl.load(p_low, mask=m_tile, other=0.0).to(tl.float32)
        b_high = tl.load(p_low + HALF, mask=m_tile, other=0.0).to(tl.float32)
        p_low = p_to + (o_out[:, None] + o_d[None, :])
        b_turned = b_low * b_cos_low - b_high * b_sin_low
        tl.store(p_low, b_turned.to(p_out.dtype.element_ty), mask=m_tile)
        b_turned = b_high * b_cos_high + b_low * b_sin_high
        tl.store(p_low + HALF, b_turned.to(p_out.dtype.element_ty), mask=m_tile)
        for start in tl.static_range(2 * HALF, HEAD_DIM, BLOCK_HALF):
            o_rest = start + o_d
            m_rest = m_n[:, None] & (o_rest < HEAD_DIM)[None, :]
            b_rest = tl.load(p_in + (o_in[:, None] + o_rest[None, :]), mask=m_rest)
            tl.store(p_to + (o_out[:, None] + o_rest[None, :]), b_rest, mask=m_rest)


def rotate(xs: Sequence[Tensor], outs: Sequence[Tensor], cos: Tensor, sin: Tensor, transposed: bool) -> None:
    """Write xs, turned, into outs: what `fastattn.rotary` validated, all of unit last stride."""
    q, k, q_out, k_out = xs[0], xs[-1], outs[0], outs[-1]
    launch = _prepare(
        layout(q), layout(k), layout(q_out), layout(k_out), layout(cos), layout(sin),
        len(xs) == 2, transposed, q.dtype, cos.dtype, q.device,
    )  # fmt: skip
    if launch.programs == 0:
        return
    with on_device(q.device):
        launch({"p_q": q, "p_k": k, "p_q_out": q_out, "p_k_out": k_out, "p_cos": cos, "p_sin": sin})


@functools.lru_cache(maxsize=256)
def _prepare(
    q: Layout,
    k: Layout,
    q_out: Layout,
    k_out: Layout,
    cos: Layout,
    sin: Layout,
    both: bool,
    transposed: bool,
    dtype: torch.dtype,
    table_dtype: torch.dtype,
    device: torch.device,  # whose code the launch keeps
) -> Launch:
    batch, num_heads, seqlen, head_dim = q[0]
    num_kv_heads = k[0][1] if both else 0
    half = cos[0][2] // 2
    block_half = triton.next_power_of_2(half)
    block_n = _TILE // block_half
    groups = triton.cdiv(num_heads, _HEADS) + triton.cdiv(num_kv_heads, _HEADS)
    # (B, N, D_rot) as a tensor of one head.
    tables = [((shape[0], 1, *shape[1:]), (stride[0], 0, *stride[1:])) for shape, stride in (cos, sin)]
    (cos_b, _, cos_n), (sin_b, _, sin_n) = map(strides, tables)
    values = named_strides({"q": q, "k": k, "qo": q_out, "ko": k_out}) | {
        "stride_cb": cos_b,
        "stride_cn": cos_n,
        "stride_sb": sin_b,
        "stride_sn": sin_n,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "seqlen": seqlen,
        "HEAD_DIM": head_dim,
        "HALF": half,
        "TRANSPOSED": transposed,
        "HEADS": _HEADS,
        "BLOCK_N": block_n,
        "BLOCK_HALF": block_half,
        "ALIGN": alignment(dtype, (q, k, q_out, k_out)),
        "TABLE_ALIGN": alignment(table_dtype, tables),
    }
    # Three axes and no division of one: what an axis gives is the whole block's, and takes no registers.
    return Launch(rotary_kernel, (triton.cdiv(seqlen, block_n), groups, batch), _OPTIONS, values)
