"""Few queries against many keys: the keys are shared out among programs, and their partial results merged.

`forward_kernel` writes the share's normalised output and log-sum-exp; this kernel weighs the shares by them
(Dao et al., "Flash-Decoding", 2023; the algebra is that of Milakov & Gimelshein's online softmax).
"""

import triton.language as tl

from .tiles import LN2, LOG2E, kernel


@kernel
def merge_kernel(
    p_parts,  # fp32 (splits, B, Hq, num_rows, HEAD_DIM_V) contiguous
    p_parts_lse,  # fp32 (splits, B, Hq, num_rows) contiguous
    p_out,
    p_lse,  # fp32 (B, Hq, num_rows) contiguous, or None
    stride_ob,
    stride_oh,
    stride_on,
    splits,
    num_heads,
    num_rows,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One query row a program: out = Σ exp(lse_s − lse) out_s, lse = log Σ exp lse_s."""
    pid = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    i_i = pid % num_rows
    i_h = pid // num_rows % num_heads
    i_b = pid // num_rows // num_heads
    o_dv = tl.arange(0, BLOCK_DV)
    m_dv = o_dv < HEAD_DIM_V
    b_acc = tl.zeros([BLOCK_DV], dtype=tl.float32)
    b_max = float("-inf")
    b_sum = 0.0
    for i_s in range(splits):
        b_part = tl.load(p_parts + (i_s * rows + pid) * HEAD_DIM_V + o_dv, mask=m_dv, other=0.0)
        b_lse = tl.load(p_parts_lse + i_s * rows + pid) * LOG2E
        b_new = tl.maximum(b_max, b_lse)
        b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_shift = tl.exp2(b_max - b_ref)
        b_weight = tl.exp2(b_lse - b_ref)
        b_acc = b_acc * b_shift + b_part * b_weight
        b_sum = b_sum * b_shift + b_weight
        b_max = b_new
    b_out = tl.where(b_sum == 0.0, 0.0, b_acc / b_sum)
    p_row = p_out + i_b * stride_ob + i_h * stride_oh + i_i * stride_on
    tl.store(p_row + o_dv, b_out.to(p_out.dtype.element_ty), mask=m_dv)
    if p_lse is not None:
        b_total = tl.where(b_sum == 0.0, float("-inf"), (b_max + tl.log2(b_sum)) * LN2)
        tl.store(p_lse + pid, b_total)
