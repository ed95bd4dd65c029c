"""The forward kernel: attention over tiles of keys with a running softmax.

Online softmax after Milakov & Gimelshein (2018), tiling after Dao (2022, 2023). Every feature is a constexpr
switch whose code is absent when it is off. The same kernel serves one head's queries and the heads of a group
folded into one tile (few queries, many keys: decoding); with SPLIT each program takes a share of the
keys and writes a partial result, which decode.py merges.
"""

import triton
import triton.language as tl

from .rng import dropout_keep
from .tiles import (
    LN2,
    LOG2E,
    aligned,
    aligned_bias,
    clear_loose_rows,
    fill_rows,
    kernel,
    load_rows,
    row_offset,
    scores,
    seen_keys,
    sequence_rows,
    store_rows,
    visible_keys,
    window_mask,
)


@triton.jit
def attend_pair(
    b_acc, b_sum, b_max, b_q, p_k, p_v, start_n, stride_kn, stride_vn, o_kn, o_vn, o_d, o_dv, scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(b_acc, b_sum, b_max) after two tiles of keys that every row sees, from start_n on.

    One maximum and one rescale serve both. A tile of twice the keys would share them too, but with all of
    its scores and addresses alive at once it spills.
    """
    p_kn = p_k + row_offset(start_n, stride_kn, FAR)
    p_vn = p_v + row_offset(start_n, stride_vn, FAR)
    b_k = load_rows(p_kn, o_kn, o_d, None, False, HEAD_DIM, BLOCK_D)
    b_s0 = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    b_k = load_rows(p_kn + BLOCK_N * stride_kn.to(tl.int64), o_kn, o_d, None, False, HEAD_DIM, BLOCK_D)
    b_s1 = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_new = tl.maximum(b_max, tl.max(tl.maximum(b_s0, b_s1), 1) * (scale * LOG2E))
    b_shift = tl.exp2(b_max - b_new)
    b_acc = b_acc * b_shift[:, None]
    b_sum = b_sum * b_shift[:, None]

    b_p = tl.exp2(b_s0 * (scale * LOG2E) - b_new[:, None])
    b_sum += tl.sum(tl.reshape(b_p, [BLOCK_M, BLOCK_N // 8, 8]), 1)
    b_v = load_rows(p_vn, o_vn, o_dv, None, False, HEAD_DIM_V, BLOCK_DV)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_DV]

    b_p = tl.exp2(b_s1 * (scale * LOG2E) - b_new[:, None])
    b_sum += tl.sum(tl.reshape(b_p, [BLOCK_M, BLOCK_N // 8, 8]), 1)
    b_v = load_rows(p_vn + BLOCK_N * stride_vn.to(tl.int64), o_vn, o_dv, None, False, HEAD_DIM_V, BLOCK_DV)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION)
    return b_acc, b_sum, b_new


@kernel
def forward_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
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
    stride_ob,
    stride_oh,
    stride_on,
    stride_lse_b,
    stride_lse_h,
    stride_split_out,
    stride_split_lse,
    stride_mask_b,
    stride_bias_b,
    stride_bias_h,
    stride_bias_q,
    stride_bias_k,
    stride_relative_h,
    stride_alibi_b,
    stride_alibi_h,
    batch,
    splits,
    num_heads,  # tiles are enumerated over these: kv heads if FOLD_HEADS, else query heads
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
    FOLD_HEADS: tl.constexpr,
    SPLIT: tl.constexpr,
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
    POSITIVE_SCALE: tl.constexpr,
    PAIRED: tl.constexpr,
):
    # Without anything added to the scores, the scale is folded into the exponential's multiply-add.
    PLAIN: tl.constexpr = POSITIVE_SCALE and not (HAS_BIAS or HAS_RELATIVE_BIAS or HAS_ALIBI or HAS_SOFTCAP)
    tl.static_assert(not PAIRED or (PLAIN and not HAS_KEY_MASK and not HAS_DROPOUT and not SPLIT))

    num_rows = seqlen_q
    if FOLD_HEADS:
        num_rows = seqlen_q * group_size
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    i_tile = tl.program_id(0)
    if SPLIT:
        i_split = i_tile % splits
        i_tile = i_tile // splits
    i_m = i_tile % tiles_m
    i_h = (i_tile // tiles_m) % num_heads
    i_b = i_tile // tiles_m // num_heads
    if HAS_RIGHT:
        i_m = tiles_m - 1 - i_m  # the last queries see the most keys: begin with them

    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    stride_qb, stride_qh, stride_qn = aligned(stride_qb, stride_qh, stride_qn, ALIGN)
    stride_kb, stride_kh, stride_kn = aligned(stride_kb, stride_kh, stride_kn, ALIGN)
    stride_vb, stride_vh, stride_vn = aligned(stride_vb, stride_vh, stride_vn, ALIGN)
    stride_ob, stride_oh, stride_on = aligned(stride_ob, stride_oh, stride_on, ALIGN)

    if PACKED and i_b == batch:
        p_out_h = p_out + i_h.to(tl.int64) * stride_oh
        p_lse_h = p_lse + i_h.to(tl.int64) * stride_lse_h if p_lse is not None else None
        clear_loose_rows(
            p_out_h, p_lse_h, p_cu_q, batch, total_q, i_m, tiles_m, stride_on, HEAD_DIM_V, BLOCK_M, BLOCK_DV
        )
        return
    row_q, len_q, claimed_q = sequence_rows(p_cu_q, i_b, seqlen_q, total_q, PACKED)
    row_k, len_k, claimed_k = sequence_rows(p_cu_k, i_b, seqlen_k, total_k, PACKED)
    if PACKED and i_m * BLOCK_M >= len_q:
        return

    o_r = i_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M] rows of the tile
    if FOLD_HEADS:
        i_kv = i_h
        o_h = (i_h * group_size + o_r % group_size).to(tl.int64)
        o_i = o_r // group_size
        m_r = o_r < num_rows
    else:
        i_kv = i_h // group_size
        o_h = i_h.to(tl.int64)
        o_i = o_r
        m_r = o_r < len_q
    last_r = tl.minimum(i_m * BLOCK_M + BLOCK_M, num_rows) - 1
    first_i = i_m * BLOCK_M // (group_size if FOLD_HEADS else 1)
    last_i = last_r // (group_size if FOLD_HEADS else 1)
    i_b64 = i_b.to(tl.int64)

    o_q = i_b64 * stride_qb + o_h * stride_qh + (row_q + o_i).to(tl.int64) * stride_qn
    b_q = load_rows(p_q, o_q, o_d, m_r, True, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]

    p_k += i_b64 * stride_kb + i_kv.to(tl.int64) * stride_kh + row_k.to(tl.int64) * stride_kn
    p_v += i_b64 * stride_vb + i_kv.to(tl.int64) * stride_vh + row_k.to(tl.int64) * stride_vn
    o_n = tl.arange(0, BLOCK_N)
    o_kn = row_offset(o_n, stride_kn, FAR)
    o_vn = row_offset(o_n, stride_vn, FAR)
    if HAS_KEY_MASK:
        p_key_mask += i_b64 * stride_mask_b
    if HAS_BIAS:
        stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k = aligned_bias(
            stride_bias_b, stride_bias_h, stride_bias_q, stride_bias_k, BIAS_ALIGN
        )
        o_bias = i_b64 * stride_bias_b + o_h * stride_bias_h
        p_bias += o_bias[:, None] if FOLD_HEADS else o_bias
    if HAS_RELATIVE_BIAS:
        o_relative = o_h * stride_relative_h
        p_relative_bias += o_relative[:, None] if FOLD_HEADS else o_relative
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(p_alibi + i_b64 * stride_alibi_b + o_h * stride_alibi_h)
        slope = slope[:, None] if FOLD_HEADS else slope
    if HAS_DROPOUT:
        if p_seed is not None:
            seed = tl.load(p_seed).to(tl.uint64, bitcast=True)
        o_h32 = o_h.to(tl.int32)[:, None] if FOLD_HEADS else o_h.to(tl.int32)

    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M, 8], dtype=tl.float32)

    diagonal = len_k - len_q
    STEP: tl.constexpr = 2 * BLOCK_N if PAIRED else BLOCK_N
    begin, full_begin, full_end, end = visible_keys(
        first_i, last_i, diagonal, len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N, STEP
    )
    if SPLIT:
        share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), splits) * BLOCK_N
        begin = begin + i_split * share
        end = tl.minimum(end, begin + share)
        full_begin = tl.minimum(tl.maximum(full_begin, begin), begin + share)
        full_end = tl.minimum(tl.maximum(full_end, full_begin), begin + share)

    # Tiles cut by the window's left edge; tiles that need no mask; tiles cut by the right edge or the last
    # key.
    for part in tl.static_range(3):
        if part == 0:
            start, stop = begin, full_begin
        elif part == 1:
            start, stop = full_begin, full_end
        else:
            start, stop = full_end, end
        if part == 1 and PAIRED:
            for start_n in tl.range(start, stop, STEP):
                start_n = tl.multiple_of(start_n, STEP)
                b_acc, b_sum, b_max = attend_pair(
                    b_acc, b_sum, b_max, b_q, p_k, p_v, start_n, stride_kn, stride_vn, o_kn, o_vn, o_d, o_dv,
                    scale, HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, FAR, PRECISION,
                )  # fmt: skip
        elif part > 0 or HAS_LEFT:
            # Beside pairs, a third stage in these short loops would take registers that those lack.
            for start_n in tl.range(start, stop, BLOCK_N, num_stages=2 if PAIRED else None):
                start_n = tl.multiple_of(start_n, BLOCK_N)
                m_n = start_n + o_n < len_k  # [BLOCK_N]
                if part != 1:
                    m_n = seen_keys(
                        start_n + o_n,
                        first_i,
                        last_i,
                        diagonal,
                        len_k,
                        window_left,
                        window_right,
                        HAS_LEFT,
                        HAS_RIGHT,
                    )
                if HAS_KEY_MASK:
                    m_n = m_n & (tl.load(p_key_mask + (start_n + o_n), mask=m_n, other=0) != 0)
                b_k = load_rows(
                    p_k + row_offset(start_n, stride_kn, FAR),
                    o_kn,
                    o_d,
                    m_n,
                    part != 1 or HAS_KEY_MASK,
                    HEAD_DIM,
                    BLOCK_D,
                )
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]

                o_i2 = o_i[:, None]
                o_j2 = (start_n + o_n)[None, :]
                if not PLAIN:
                    m_in = m_r[:, None] & m_n[None, :]
                    b_s, _ = scores(
                        b_s, o_i2, o_j2, m_in, diagonal, scale, softcap, p_bias, stride_bias_q, stride_bias_k,
                        p_relative_bias, seqlen_q, slope, HAS_SOFTCAP, HAS_BIAS, HAS_RELATIVE_BIAS, HAS_ALIBI,
                    )  # fmt: skip
                if part != 1:
                    m_tile = window_mask(
                        o_i2, o_j2, diagonal, len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
                    )
                    b_s = tl.where(m_tile, b_s, float("-inf"))
                if HAS_KEY_MASK:
                    b_s = tl.where(m_n[None, :], b_s, float("-inf"))

                b_top = tl.max(b_s, 1)
                if PLAIN:
                    b_top = b_top * (scale * LOG2E)
                b_new = tl.maximum(b_max, b_top)
                b_ref = b_new
                if part != 1 or HAS_KEY_MASK or HAS_BIAS or HAS_RELATIVE_BIAS:
                    # A row may have seen nothing yet: keep −inf − (−inf) out.
                    b_ref = tl.where(b_new == float("-inf"), 0.0, b_new)
                b_shift = tl.exp2(b_max - b_ref)
                if PLAIN:
                    b_p = tl.exp2(b_s * (scale * LOG2E) - b_ref[:, None])
                else:
                    b_p = tl.exp2(b_s - b_ref[:, None])
                b_sum = b_sum * b_shift[:, None] + tl.sum(tl.reshape(b_p, [BLOCK_M, BLOCK_N // 8, 8]), 1)
                if HAS_DROPOUT:
                    keep = dropout_keep(seed, i_b, o_h32, o_i2, start_n, o_n[None, :], drop_below)
                    b_p = tl.where(keep, b_p, 0.0)
                b_v = load_rows(
                    p_v + row_offset(start_n, stride_vn, FAR),
                    o_vn,
                    o_dv,
                    m_n,
                    part != 1 or HAS_KEY_MASK,
                    HEAD_DIM_V,
                    BLOCK_DV,
                )
                b_acc = b_acc * b_shift[:, None]
                b_acc = tl.dot(
                    b_p.to(b_v.dtype), b_v, b_acc, input_precision=PRECISION
                )  # [BLOCK_M, BLOCK_DV]
                b_max = b_new

    b_sum = tl.sum(b_sum, 1)
    # An understated max_seqlen is known to the device alone: make it loud.
    if PACKED and (claimed_q > len_q) | (claimed_k > len_k):
        b_sum = b_sum * float("nan")
    b_weight = tl.where(b_sum == 0.0, 0.0, 1.0 / b_sum)
    if HAS_DROPOUT:
        b_weight = b_weight * keep_scale
    o_out = i_b64 * stride_ob + o_h * stride_oh + (row_q + o_i).to(tl.int64) * stride_on
    if SPLIT:
        p_out += i_split.to(tl.int64) * stride_split_out
    store_rows(p_out, b_acc * b_weight[:, None], o_out, o_dv, m_r, HEAD_DIM_V, BLOCK_DV)
    if p_lse is not None:
        b_lse = tl.where(b_sum == 0.0, float("-inf"), (b_max + tl.log2(b_sum)) * LN2)
        if SPLIT:
            p_lse += i_split.to(tl.int64) * stride_split_lse
        tl.store(p_lse + i_b64 * stride_lse_b + o_h * stride_lse_h + (row_q + o_i), b_lse, mask=m_r)
    if PACKED and (i_m == tiles_m - 1) & (claimed_q > len_q):
        p_out_h = p_out + i_h.to(tl.int64) * stride_oh
        p_lse_h = p_lse + i_h.to(tl.int64) * stride_lse_h if p_lse is not None else None
        nan = float("nan")
        first, last = row_q + len_q, row_q + claimed_q
        fill_rows(p_out_h, p_lse_h, first, last, BLOCK_M, stride_on, nan, nan, HEAD_DIM_V, BLOCK_M, BLOCK_DV)
