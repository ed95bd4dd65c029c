"""Rotary positions of q and k, one kernel for both: see fastattn/rotary.py.

A program turns HEADS heads of q or k at BLOCK_N positions, so that angles are read once for several heads.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .arguments import alignment, layout, named_strides, strides
from .device import on_device
from .tiles import aligned, kernel

_HEADS = 4
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
    q, k, q_out, k_out = layout(xs[0]), layout(xs[-1]), layout(outs[0]), layout(outs[-1])
    tables = layout(cos[:, None]), layout(sin[:, None])
    batch, num_heads, seqlen, head_dim = xs[0].shape
    num_kv_heads = xs[1].shape[1] if len(xs) == 2 else 0
    half = cos.shape[2] // 2
    if all(x.numel() == 0 for x in xs):
        return
    block_half = triton.next_power_of_2(half)
    block_n = _TILE // block_half
    groups = triton.cdiv(num_heads, _HEADS) + triton.cdiv(num_kv_heads, _HEADS)
    (cos_b, _, cos_n), (sin_b, _, sin_n) = map(strides, tables)
    with on_device(xs[0].device):
        rotary_kernel[(triton.cdiv(seqlen, block_n), groups, batch)](
            p_q=xs[0], p_k=xs[-1], p_q_out=outs[0], p_k_out=outs[-1], p_cos=cos, p_sin=sin,
            **named_strides({"q": q, "k": k, "qo": q_out, "ko": k_out}),
            stride_cb=cos_b, stride_cn=cos_n, stride_sb=sin_b, stride_sn=sin_n,
            num_heads=num_heads, num_kv_heads=num_kv_heads, seqlen=seqlen,
            HEAD_DIM=head_dim, HALF=half, TRANSPOSED=transposed, HEADS=_HEADS,
            BLOCK_N=block_n, BLOCK_HALF=block_half,
            ALIGN=alignment(xs[0].dtype, (q, k, q_out, k_out)), TABLE_ALIGN=alignment(cos.dtype, tables),
        )  # fmt: skip
