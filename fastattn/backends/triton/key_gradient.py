"""The dk/dv kernel: a program walks the queries of a tile of keys, over all query heads of the kv head.

It leaves out whichever of dk and dv is not wanted. The formulas stand in backward.py.
"""

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
    visible_queries,
    weights,
)


@kernel
def dkdv_kernel(
    p_q,
    p_k,
    p_v,
    p_dout,
    p_lse,
    p_delta,
    p_dk,
    p_dv,
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
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dvb,
    stride_dvh,
    stride_dvn,
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
    num_heads,  # kv heads: a program sums over the group_size query heads of its own
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
    WANT_DK: tl.constexpr,
    WANT_DV: tl.constexpr,
    GROUPED: tl.constexpr,
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
    tiles_n = tl.cdiv(seqlen_k, BLOCK_N)
    i_n = tl.program_id(0) % tiles_n  # the first keys are seen by the most queries: begin with them
    i_kv = (tl.program_id(0) // tiles_n) % num_heads
    i_b = tl.program_id(0) // tiles_n // num_heads
    i_b64 = i_b.to(tl.int64)
    i_kv64 = i_kv.to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    stride_qb, stride_qh, stride_qn = aligned(stride_qb, stride_qh, stride_qn, ALIGN)
    stride_kb, stride_kh, stride_kn = aligned(stride_kb, stride_kh, stride_kn, ALIGN)
    stride_vb, stride_vh, stride_vn = aligned(stride_vb, stride_vh, stride_vn, ALIGN)
    stride_gb, stride_gh, stride_gn = aligned(stride_gb, stride_gh, stride_gn, ALIGN)

    if WANT_DK:
        stride_dkb, stride_dkh, stride_dkn = aligned(stride_dkb, stride_dkh, stride_dkn, ALIGN)
        p_dk += i_b64 * stride_dkb + i_kv64 * stride_dkh
    if WANT_DV:
        stride_dvb, stride_dvh, stride_dvn = aligned(stride_dvb, stride_dvh, stride_dvn, ALIGN)
        p_dv += i_b64 * stride_dvb + i_kv64 * stride_dvh
    if PACKED and i_b == batch:
        if WANT_DK:
            clear_loose_rows(
                p_dk, None, p_cu_k, batch, total_k, i_n, tiles_n, stride_dkn, HEAD_DIM, BLOCK_N, BLOCK_D
            )
        if WANT_DV:
            clear_loose_rows(
                p_dv, None, p_cu_k, batch, total_k, i_n, tiles_n, stride_dvn, HEAD_DIM_V, BLOCK_N, BLOCK_DV
            )
        return
    row_q, len_q, _claimed_q = sequence_rows(p_cu_q, i_b, seqlen_q, total_q, PACKED)
    row_k, len_k, claimed_k = sequence_rows(p_cu_k, i_b, seqlen_k, total_k, PACKED)
    if PACKED and i_n * BLOCK_N >= len_k:
        return

    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_n = o_n < len_k
    diagonal = len_k - len_q
    m_seen = seen_keys(o_n, 0, len_q - 1, diagonal, len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT)
    if HAS_KEY_MASK:
        p_mask = p_key_mask + i_b64 * stride_mask_b + o_n
        m_seen = m_seen & (tl.load(p_mask, mask=m_n, other=0) != 0)
    o_row = (row_k + o_n).to(tl.int64)
    o_k = i_b64 * stride_kb + i_kv64 * stride_kh + o_row * stride_kn
    b_k = load_rows(p_k, o_k, o_d, m_seen, True, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    if WANT_DK:
        o_v = i_b64 * stride_vb + i_kv64 * stride_vh + o_row * stride_vn
        b_v = load_rows(p_v, o_v, o_dv, m_seen, True, HEAD_DIM_V, BLOCK_DV)  # [BLOCK_N, BLOCK_DV]
    if HAS_DROPOUT and p_seed is not None:
        seed = tl.load(p_seed).to(tl.uint64, bitcast=True)

    if HAS_BIAS:
        stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k = aligned_bias(
            stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, BIAS_ALIGN
        )
    o_m = tl.arange(0, BLOCK_M)
    o_qm = row_offset(o_m, stride_qn, FAR)
    o_gm = row_offset(o_m, stride_gn, FAR)
    last_j = tl.minimum(i_n * BLOCK_N + BLOCK_N, len_k) - 1
    begin, full_begin, full_end, end = visible_queries(
        i_n * BLOCK_N, last_j, diagonal, len_q, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_M
    )
    # A loop of one turn is no loop, and gives its registers to the one inside.
    for i_group in range(group_size if GROUPED else 1):
        i_h = i_kv * group_size + i_group
        i_h64 = i_h.to(tl.int64)
        p_q_h = p_q + i_b64 * stride_qb + i_h64 * stride_qh + row_q.to(tl.int64) * stride_qn
        p_dout_h = p_dout + i_b64 * stride_gb + i_h64 * stride_gh + row_q.to(tl.int64) * stride_gn
        o_stat = i_b64 * stride_lse_b + i_h64 * stride_lse_h + row_q
        p_bias_h = p_bias
        p_relative_h = p_relative_bias
        slope = 0.0
        if HAS_BIAS:
            p_bias_h = p_bias + i_b64 * stride_bias_b + i_h64 * stride_bias_h
        if HAS_RELATIVE_BIAS:
            p_relative_h = p_relative_bias + i_h64 * stride_relative_h
        if HAS_ALIBI:
            slope = tl.load(p_alibi + i_b64 * stride_alibi_b + i_h64 * stride_alibi_h)
        # The last queries need no part of their own: their rows are checked where they are loaded, and a row
        # that doesn't exist has weight 0. Fewer loops leave more registers to each.
        for part in tl.static_range(3):
            if part == 0:
                start, stop = begin, full_begin
            elif part == 1:
                start, stop = full_begin, full_end if HAS_LEFT else end
            else:
                start, stop = full_end, end
            if part == 1 or (part == 0 and HAS_RIGHT) or (part == 2 and HAS_LEFT):
                for start_m in tl.range(start, stop, BLOCK_M):
                    start_m = tl.multiple_of(start_m, BLOCK_M)
                    m_m = start_m + o_m < len_q  # [BLOCK_M]
                    p_qm = p_q_h + row_offset(start_m, stride_qn, FAR)
                    p_dm = p_dout_h + row_offset(start_m, stride_gn, FAR)
                    b_q = load_rows(p_qm, o_qm, o_d, m_m, True, HEAD_DIM, BLOCK_D)
                    b_dout = load_rows(p_dm, o_gm, o_dv, m_m, True, HEAD_DIM_V, BLOCK_DV)
                    b_lse = load_lse(p_lse + o_stat, start_m + o_m, m_m)  # [BLOCK_M]

                    o_i2 = (start_m + o_m)[None, :]
                    m_in = m_n[:, None] & m_m[None, :]
                    b_kq = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
                    b_p, b_slope = weights(
                        b_kq, b_lse[None, :], o_i2, o_n[:, None], m_in, diagonal, len_k, window_left,
                        window_right, scale, softcap, p_bias_h, stride_bias_q, stride_bias_k, p_relative_h,
                        seqlen_q, slope, part != 1, HAS_LEFT, HAS_RIGHT,
                        HAS_SOFTCAP, HAS_BIAS, HAS_RELATIVE_BIAS, HAS_ALIBI,
                    )  # fmt: skip
                    if HAS_DROPOUT:
                        i_c = i_n * BLOCK_N
                        keep = dropout_keep(seed, i_b, i_h, o_i2, i_c, (o_n - i_c)[:, None], drop_below)
                    if WANT_DV:
                        b_kept = b_p
                        if HAS_DROPOUT:
                            b_kept = tl.where(keep, b_p * keep_scale, 0.0)
                        b_dv = tl.dot(b_kept.to(b_dout.dtype), b_dout, b_dv, input_precision=PRECISION)
                    if WANT_DK:
                        b_delta = tl.load(p_delta + o_stat + start_m + o_m, mask=m_m, other=0.0)  # [BLOCK_M]
                        b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
                        if HAS_DROPOUT:
                            b_dp = tl.where(keep, b_dp * keep_scale, 0.0)
                        b_ds = b_p * (b_dp - b_delta[None, :])
                        if HAS_SOFTCAP:
                            b_ds = b_ds * b_slope
                        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)

    if WANT_DK:
        b_dk = tl.where(m_seen[:, None], b_dk * scale, 0.0)
        store_rows(p_dk, b_dk, o_row * stride_dkn, o_d, m_n, HEAD_DIM, BLOCK_D)
    if WANT_DV:
        b_dv = tl.where(m_seen[:, None], b_dv, 0.0)
        store_rows(p_dv, b_dv, o_row * stride_dvn, o_dv, m_n, HEAD_DIM_V, BLOCK_DV)
    if PACKED and (i_n == tiles_n - 1) & (claimed_k > len_k):
        first, last = row_k + len_k, row_k + claimed_k
        nan = float("nan")
        if WANT_DK:
            fill_rows(p_dk, None, first, last, BLOCK_N, stride_dkn, nan, nan, HEAD_DIM, BLOCK_N, BLOCK_D)
        if WANT_DV:
            fill_rows(p_dv, None, first, last, BLOCK_N, stride_dvn, nan, nan, HEAD_DIM_V, BLOCK_N, BLOCK_DV)
