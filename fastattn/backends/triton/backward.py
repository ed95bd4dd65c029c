"""What the backward passes compute, and delta, their first: all apart, so that nothing is added atomically.

With s the scores of forward, p = exp(s − lse) and dp = dout vᵀ (Dao 2022, appendix B; 2023):
    delta = rowsum(out ∘ dout) − dlse        dv = pᵀ dout        ds = p ∘ (dp − delta)
    dq = scale · ds k                        dk = scale · dsᵀ q
Dropout multiplies p by the kept weights' scale in dv and dp in ds; softcap multiplies ds by its derivative.
The other passes: query_gradient.py, key_gradient.py, and bias_backward.py for the gradients of biases.
"""

import triton.language as tl

from .tiles import aligned, kernel, load_rows


@kernel
def delta_kernel(
    p_out,
    p_dout,
    p_dlse,
    p_delta,
    stride_ob,
    stride_oh,
    stride_on,
    stride_gb,
    stride_gh,
    stride_gn,
    num_heads,
    num_rows,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """delta[b, h, i] = Σ out · dout − dlse. All of delta and dlse are contiguous (B, Hq, num_rows)."""
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    i_m = tl.program_id(0) % tiles_m
    i_bh = (tl.program_id(0) // tiles_m).to(tl.int64)
    i_b = i_bh // num_heads
    i_h = i_bh % num_heads
    stride_ob, stride_oh, stride_on = aligned(stride_ob, stride_oh, stride_on, ALIGN)
    stride_gb, stride_gh, stride_gn = aligned(stride_gb, stride_gh, stride_gn, ALIGN)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_dv = tl.arange(0, BLOCK_DV)
    m_m = o_m < num_rows
    o_row = o_m.to(tl.int64)
    o_out = i_b * stride_ob + i_h * stride_oh + o_row * stride_on
    o_dout = i_b * stride_gb + i_h * stride_gh + o_row * stride_gn
    b_out = load_rows(p_out, o_out, o_dv, m_m, True, HEAD_DIM_V, BLOCK_DV).to(
        tl.float32
    )  # [BLOCK_M, BLOCK_DV]
    b_dout = load_rows(p_dout, o_dout, o_dv, m_m, True, HEAD_DIM_V, BLOCK_DV).to(tl.float32)
    b_delta = tl.sum(b_out * b_dout, 1)  # [BLOCK_M]
    if p_dlse is not None:
        b_delta -= tl.load(p_dlse + i_bh * num_rows + o_m, mask=m_m, other=0.0)
    tl.store(p_delta + i_bh * num_rows + o_m, b_delta, mask=m_m)
