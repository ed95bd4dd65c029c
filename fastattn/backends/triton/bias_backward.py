"""The gradients of biases: one pass that sums ds over every axis the bias is broadcast on.

A program owns one tile of the bias's gradient and visits, in a fixed order, every tile of ds that reaches it,
so the sums need neither atomics nor memory beyond the result. relative_bias lies along diagonals: tiles (m, m
+ t) carry the same diagonals at the same places, so a program sums them for one t as they are and skews the
sum once at the end.
"""

import triton.language as tl

from .rng import dropout_keep
from .tiles import (
    aligned,
    aligned_bias,
    kernel,
    load_columns,
    load_lse,
    load_rows,
    seen_keys,
    sequence_rows,
    weights,
)


@kernel
def dbias_kernel(
    p_q,
    p_k,
    p_v,
    p_dout,
    p_lse,
    p_delta,
    p_dbias,  # (bias_batch, bias_heads, Nq or 1, Nk or 1); if DIAGONAL (Hq, tile diagonals, 2, BLOCK)
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
    bias_batch,
    bias_heads,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    DIAGONAL: tl.constexpr,
    REDUCE_Q: tl.constexpr,
    REDUCE_K: tl.constexpr,
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
    tiles_m = tl.cdiv(seqlen_q, BLOCK)
    tiles_n = tl.cdiv(seqlen_k, BLOCK)
    stride_qb, stride_qh, stride_qn = aligned(stride_qb, stride_qh, stride_qn, ALIGN)
    stride_kb, stride_kh, stride_kn = aligned(stride_kb, stride_kh, stride_kn, ALIGN)
    stride_vb, stride_vh, stride_vn = aligned(stride_vb, stride_vh, stride_vn, ALIGN)
    stride_gb, stride_gh, stride_gn = aligned(stride_gb, stride_gh, stride_gn, ALIGN)

    # The box of (sequence, head, query tile, key tile) that this program sums over.
    pid = tl.program_id(0)
    if DIAGONAL:
        tile_diagonals = tiles_m + tiles_n - 1
        shift = pid % tile_diagonals - (tiles_m - 1)  # key tile − query tile
        first_h = pid // tile_diagonals
        heads = 1
        first_b = 0
        sequences = batch
        first_m = tl.maximum(-shift, 0)
        count_m = tl.minimum(tiles_m, tiles_n - shift) - first_m
        first_n = first_m + shift
        count_n = 1
    else:
        owned_m = 1 if REDUCE_Q else tiles_m
        owned_n = 1 if REDUCE_K else tiles_n
        first_n = pid % owned_n
        first_m = (pid // owned_n) % owned_m
        first_h = (pid // owned_n // owned_m) % bias_heads
        first_b = pid // owned_n // owned_m // bias_heads
        heads = num_heads if bias_heads == 1 else 1
        sequences = batch if bias_batch == 1 else 1
        count_m = tiles_m if REDUCE_Q else 1
        count_n = tiles_n if REDUCE_K else 1

    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_t = tl.arange(0, BLOCK)
    if HAS_BIAS:
        stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k = aligned_bias(
            stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, BIAS_ALIGN
        )
    if HAS_DROPOUT and p_seed is not None:
        seed = tl.load(p_seed).to(tl.uint64, bitcast=True)
    b_sum = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for visit in range(sequences * heads * count_m * count_n):
        i_m = first_m + visit // count_n % count_m
        i_n = first_n + visit % count_n
        if DIAGONAL:
            i_n = i_m + shift
        i_h = first_h + visit // (count_n * count_m) % heads
        i_b = first_b + visit // (count_n * count_m) // heads
        i_b64 = i_b.to(tl.int64)
        i_h64 = i_h.to(tl.int64)
        i_kv = (i_h // group_size).to(tl.int64)
        row_q, len_q, _claimed_q = sequence_rows(p_cu_q, i_b, seqlen_q, total_q, PACKED)
        row_k, len_k, _claimed_k = sequence_rows(p_cu_k, i_b, seqlen_k, total_k, PACKED)
        diagonal = len_k - len_q
        seen = (i_m * BLOCK < len_q) & (i_n * BLOCK < len_k)
        if HAS_RIGHT:
            seen = seen & (i_n * BLOCK <= (i_m + 1) * BLOCK - 1 + diagonal + window_right)
        if HAS_LEFT:
            seen = seen & ((i_n + 1) * BLOCK - 1 >= i_m * BLOCK + diagonal - window_left)
        if seen:
            o_m = i_m * BLOCK + o_t  # [BLOCK]
            o_n = i_n * BLOCK + o_t  # [BLOCK]
            m_m = o_m < len_q
            last_i = tl.minimum(i_m * BLOCK + BLOCK, len_q) - 1
            m_n = seen_keys(
                o_n, i_m * BLOCK, last_i, diagonal, len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
            )
            if HAS_KEY_MASK:
                p_mask = p_key_mask + i_b64 * stride_mask_b + o_n
                m_n = m_n & (tl.load(p_mask, mask=m_n, other=0) != 0)
            o_row_q = (row_q + o_m).to(tl.int64)
            o_row_k = (row_k + o_n).to(tl.int64)
            o_q = i_b64 * stride_qb + i_h64 * stride_qh + o_row_q * stride_qn
            o_k = i_b64 * stride_kb + i_kv * stride_kh + o_row_k * stride_kn
            o_v = i_b64 * stride_vb + i_kv * stride_vh + o_row_k * stride_vn
            o_dout = i_b64 * stride_gb + i_h64 * stride_gh + o_row_q * stride_gn
            b_q = load_rows(p_q, o_q, o_d, m_m, True, HEAD_DIM, BLOCK_D)  # [BLOCK, BLOCK_D]
            b_k = load_columns(p_k, o_k, o_d, m_n, HEAD_DIM, BLOCK_D)  # [BLOCK_D, BLOCK]
            b_v = load_columns(p_v, o_v, o_dv, m_n, HEAD_DIM_V, BLOCK_DV)  # [BLOCK_DV, BLOCK]
            b_dout = load_rows(p_dout, o_dout, o_dv, m_m, True, HEAD_DIM_V, BLOCK_DV)
            o_stat = i_b64 * stride_lse_b + i_h64 * stride_lse_h + row_q
            b_lse = load_lse(p_lse + o_stat, o_m, m_m)  # [BLOCK]
            b_delta = tl.load(p_delta + o_stat + o_m, mask=m_m, other=0.0)
            p_bias_bh = p_bias
            p_relative_h = p_relative_bias
            slope = 0.0
            if HAS_BIAS:
                p_bias_bh = p_bias + i_b64 * stride_bias_b + i_h64 * stride_bias_h
            if HAS_RELATIVE_BIAS:
                p_relative_h = p_relative_bias + i_h64 * stride_relative_h
            if HAS_ALIBI:
                slope = tl.load(p_alibi + i_b64 * stride_alibi_b + i_h64 * stride_alibi_h)

            m_in = m_m[:, None] & m_n[None, :]
            b_qk = tl.dot(b_q, b_k, input_precision=PRECISION)  # [BLOCK, BLOCK]
            b_p, _ = weights(
                b_qk, b_lse[:, None], o_m[:, None], o_n[None, :], m_in, diagonal, len_k, window_left,
                window_right, scale, softcap, p_bias_bh, stride_bias_q, stride_bias_k, p_relative_h, seqlen_q,
                slope, True, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_BIAS, HAS_RELATIVE_BIAS, HAS_ALIBI,
            )  # fmt: skip
            b_p = tl.where(m_in, b_p, 0.0)
            b_dp = tl.dot(b_dout, b_v, input_precision=PRECISION)  # [BLOCK, BLOCK]
            if HAS_DROPOUT:
                keep = dropout_keep(seed, i_b, i_h, o_m[:, None], i_n * BLOCK, o_t[None, :], drop_below)
                b_dp = tl.where(keep, b_dp * keep_scale, 0.0)
            b_sum += b_p * (b_dp - b_delta[:, None])

    if DIAGONAL:
        # Column c of the skewed sum holds diagonal c of the tile diagonal, or diagonal c − BLOCK where it
        # wrapped.
        o_wrapped = o_t[:, None] + o_t[None, :]
        b_skewed = tl.gather(b_sum, o_wrapped % BLOCK, 1)
        p_upper = p_dbias + pid.to(tl.int64) * (2 * BLOCK) + o_t
        tl.store(p_upper, tl.sum(tl.where(o_wrapped < BLOCK, b_skewed, 0.0), 0))
        tl.store(p_upper + BLOCK, tl.sum(tl.where(o_wrapped < BLOCK, 0.0, b_skewed), 0))
    else:
        rows = 1 if REDUCE_Q else seqlen_q
        columns = 1 if REDUCE_K else seqlen_k
        p_plane = p_dbias + (first_b.to(tl.int64) * bias_heads + first_h) * rows * columns
        o_m = first_m * BLOCK + o_t
        o_n = first_n * BLOCK + o_t
        if REDUCE_Q and REDUCE_K:
            tl.store(p_plane, tl.sum(tl.sum(b_sum, 1), 0))
        elif REDUCE_Q:
            tl.store(p_plane + o_n, tl.sum(b_sum, 0), mask=o_n < columns)
        elif REDUCE_K:
            tl.store(p_plane + o_m, tl.sum(b_sum, 1), mask=o_m < rows)
        else:
            o_tile = o_m.to(tl.int64)[:, None] * columns + o_n[None, :]
            tl.store(p_plane + o_tile, b_sum, mask=(o_m < rows)[:, None] & (o_n < columns)[None, :])


@kernel
def join_diagonals_kernel(p_parts, p_drelative, seqlen_q, seqlen_k, BLOCK: tl.constexpr):
    """(Hq, tile diagonals, 2, BLOCK) partial sums into (Hq, seqlen_q + seqlen_k − 1).

    Two parts to an entry.
    """
    tiles_m = tl.cdiv(seqlen_q, BLOCK)
    tile_diagonals = tiles_m + tl.cdiv(seqlen_k, BLOCK) - 1
    entries = seqlen_q + seqlen_k - 1
    blocks = tl.cdiv(entries, BLOCK)
    i_h = (tl.program_id(0) // blocks).to(tl.int64)
    o_x = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < entries
    o_shifted = o_x - (seqlen_q - 1) + tiles_m * BLOCK  # j − i, moved up to be positive
    i_t = o_shifted // BLOCK - 1  # the tile diagonal whose upper part holds it; its lower part is in the next
    o_c = o_shifted % BLOCK
    p_head = p_parts + i_h * tile_diagonals * 2 * BLOCK
    b_upper = tl.load(
        p_head + i_t * 2 * BLOCK + o_c, mask=m_x & (i_t >= 0) & (i_t < tile_diagonals), other=0.0
    )
    b_lower = tl.load(
        p_head + (i_t + 1) * 2 * BLOCK + BLOCK + o_c, mask=m_x & (i_t + 1 < tile_diagonals), other=0.0
    )
    tl.store(p_drelative + i_h * entries + o_x, b_upper + b_lower, mask=m_x)
