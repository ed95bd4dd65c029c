"""The dq kernel: a program walks the keys of a tile of queries. The formulas stand in backward.py."""

import triton.language as tl

from .rng import dropout_keep
from .tiles import (
    aligned,
    aligned_bias,
    clear_loose_rows,
    fill_rows,
    kernel,
    load_lse,
    load_rows,
    row_offset,
    seen_keys,
    sequence_rows,
    store_rows,
    visible_keys,
    weights,
)


@kernel
def dq_kernel(
    p_q,
    p_k,
    p_v,
    p_dout,
    p_lse,
    p_delta,
    p_dq,
    p_key_mask,
    p_bias,
    p_relative_bias,
    p_alibi,
    p_cu_q,
    p_cu_k,
    p_seed,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_dqb,
    stride_dqh,
    stride_dqn,
    stride_lse_b,
    stride_lse_h,
    stride_mask_b,
    stride_bias_b,
    stride_bias_h,
    stride_bias_q,
    stride_bias_k,
    stride_relative_h,
    stride_alibi_b,
    stride_alibi_h,
    batch,
    num_heads,
    group_size,
    seqlen_q,
    seqlen_k,
    total_q,
    total_k,
    window_left,
    window_right,
    scale,
    softcap,
    seed: tl.uint64,
    drop_below,
    keep_scale,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ALIGN: tl.constexpr,
    FAR: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BIAS_ALIGN: tl.constexpr,
    HAS_RELATIVE_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    tiles_m = tl.cdiv(seqlen_q, BLOCK_M)
    i_m = tl.program_id(0) % tiles_m
    i_h = (tl.program_id(0) // tiles_m) % num_heads
    i_b = tl.program_id(0) // tiles_m // num_heads
    if HAS_RIGHT:
        i_m = tiles_m - 1 - i_m
    i_b64 = i_b.to(tl.int64)
    i_h64 = i_h.to(tl.int64)
    i_kv = (i_h // group_size).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    stride_qb, stride_qh, stride_qn = aligned(stride_qb, stride_qh, stride_qn, ALIGN)
    stride_kb, stride_kh, stride_kn = aligned(stride_kb, stride_kh, stride_kn, ALIGN)
    stride_vb, stride_vh, stride_vn = aligned(stride_vb, stride_vh, stride_vn, ALIGN)
    stride_gb, stride_gh, stride_gn = aligned(stride_gb, stride_gh, stride_gn, ALIGN)
    stride_dqb, stride_dqh, stride_dqn = aligned(stride_dqb, stride_dqh, stride_dqn, ALIGN)

    p_dq += i_b64 * stride_dqb + i_h64 * stride_dqh
    if PACKED and i_b == batch:
        clear_loose_rows(
            p_dq, None, p_cu_q, batch, total_q, i_m, tiles_m, stride_dqn, HEAD_DIM, BLOCK_M, BLOCK_D
        )
        return
    row_q, len_q, claimed_q = sequence_rows(p_cu_q, i_b, seqlen_q, total_q, PACKED)
    row_k, len_k, _claimed_k = sequence_rows(p_cu_k, i_b, seqlen_k, total_k, PACKED)
    if PACKED and i_m * BLOCK_M >= len_q:
        return

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_m = o_m < len_q
    o_row = (row_q + o_m).to(tl.int64)
    o_q = i_b64 * stride_qb + i_h64 * stride_qh + o_row * stride_qn
    o_dout = i_b64 * stride_gb + i_h64 * stride_gh + o_row * stride_gn
    b_q = load_rows(p_q, o_q, o_d, m_m, True, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    b_dout = load_rows(p_dout, o_dout, o_dv, m_m, True, HEAD_DIM_V, BLOCK_DV)  # [BLOCK_M, BLOCK_DV]
    o_stat = i_b64 * stride_lse_b + i_h64 * stride_lse_h + row_q
    b_lse = load_lse(p_lse + o_stat, o_m, m_m)  # [BLOCK_M]
    b_delta = tl.load(p_delta + o_stat + o_m, mask=m_m, other=0.0)

    p_k += i_b64 * stride_kb + i_kv * stride_kh + row_k.to(tl.int64) * stride_kn
    p_v += i_b64 * stride_vb + i_kv * stride_vh + row_k.to(tl.int64) * stride_vn
    o_n = tl.arange(0, BLOCK_N)
    o_kn = row_offset(o_n, stride_kn, FAR)
    o_vn = row_offset(o_n, stride_vn, FAR)
    if HAS_KEY_MASK:
        p_key_mask += i_b64 * stride_mask_b
    if HAS_BIAS:
        stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k = aligned_bias(
            stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, BIAS_ALIGN
        )
        p_bias += i_b64 * stride_bias_b + i_h64 * stride_bias_h
    if HAS_RELATIVE_BIAS:
        p_relative_bias += i_h64 * stride_relative_h
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(p_alibi + i_b64 * stride_alibi_b + i_h64 * stride_alibi_h)
    if HAS_DROPOUT and p_seed is not None:
        seed = tl.load(p_seed).to(tl.uint64, bitcast=True)

    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    diagonal = len_k - len_q
    last_i = tl.minimum(i_m * BLOCK_M + BLOCK_M, len_q) - 1
    begin, full_begin, full_end, end = visible_keys(
        i_m * BLOCK_M,
        last_i,
        diagonal,
        len_k,
        window_left,
        window_right,
        HAS_LEFT,
        HAS_RIGHT,
        BLOCK_N,
        BLOCK_N,
    )
    for part in tl.static_range(3):
        if part == 0:
            start, stop = begin, full_begin
        elif part == 1:
            start, stop = full_begin, full_end
        else:
            start, stop = full_end, end
        if part > 0 or HAS_LEFT:
            for start_n in tl.range(start, stop, BLOCK_N):
                start_n = tl.multiple_of(start_n, BLOCK_N)
                m_n = start_n + o_n < len_k  # [BLOCK_N]
                if part != 1:
                    m_n = seen_keys(
                        start_n + o_n, i_m * BLOCK_M, last_i, diagonal, len_k, window_left, window_right,
                        HAS_LEFT, HAS_RIGHT,
                    )  # fmt: skip
                if HAS_KEY_MASK:
                    m_n = m_n & (tl.load(p_key_mask + (start_n + o_n), mask=m_n, other=0) != 0)
                p_kn = p_k + row_offset(start_n, stride_kn, FAR)
                p_vn = p_v + row_offset(start_n, stride_vn, FAR)
                b_k = load_rows(p_kn, o_kn, o_d, m_n, part != 1 or HAS_KEY_MASK, HEAD_DIM, BLOCK_D)
                b_v = load_rows(p_vn, o_vn, o_dv, m_n, part != 1 or HAS_KEY_MASK, HEAD_DIM_V, BLOCK_DV)

                m_in = m_m[:, None] & m_n[None, :]
                b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
                b_p, b_slope = weights(
                    b_qk, b_lse[:, None], o_m[:, None], (start_n + o_n)[None, :], m_in, diagonal, len_k,
                    window_left, window_right, scale, softcap, p_bias, stride_bias_q, stride_bias_k,
                    p_relative_bias, seqlen_q, slope, part != 1, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_BIAS,
                    HAS_RELATIVE_BIAS, HAS_ALIBI,
                )  # fmt: skip
                if HAS_KEY_MASK:
                    b_p = tl.where(m_n[None, :], b_p, 0.0)
                b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
                if HAS_DROPOUT:
                    keep = dropout_keep(seed, i_b, i_h, o_m[:, None], start_n, o_n[None, :], drop_below)
                    b_dp = tl.where(keep, b_dp * keep_scale, 0.0)
                b_ds = b_p * (b_dp - b_delta[:, None])
                if HAS_SOFTCAP:
                    b_ds = b_ds * b_slope
                b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]

    store_rows(p_dq, b_dq * scale, o_row * stride_dqn, o_d, m_m, HEAD_DIM, BLOCK_D)
    if PACKED and (i_m == tiles_m - 1) & (claimed_q > len_q):
        fill_rows(
            p_dq, None, row_q + len_q, row_q + claimed_q, BLOCK_M, stride_dqn, float("nan"), 0.0, HEAD_DIM,
            BLOCK_M, BLOCK_D,
        )  # fmt: skip
