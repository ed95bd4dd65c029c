"""What every kernel shares: where a tile lies, which keys it sees, how products become scores.

Scores are in base 2 throughout (multiplied by log2 e), because the hardware's exponential is 2**x. The two
positions of a score are given as index tensors o_i (queries) and o_j (keys) that already broadcast against
the tile, so one helper serves tiles of either orientation.
"""

import inspect

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def kernel(fn):
    """triton.jit of a kernel that is specialised for its pointers and constexprs alone.

    Lengths, strides and seeds change from batch to batch and must not compile it anew; what wide loads need
    to know of the strides is the constexpr ALIGN.
    """
    parameters = inspect.signature(fn).parameters.values()
    values = [p.name for p in parameters if not p.name.startswith("p_") and p.annotation is not tl.constexpr]
    return triton.jit(fn, do_not_specialize=values)


@triton.jit
def load_rows(
    p_base, o_rows, o_cols, m_rows, CHECK_ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    """[rows, BLOCK_COLS] tile at element offsets o_rows + o_cols.

    What lies outside m_rows or beyond COLS reads 0.
    """
    p_tile = p_base + (o_rows[:, None] + o_cols[None, :])
    if COLS == BLOCK_COLS:
        if CHECK_ROWS:
            return tl.load(p_tile, mask=m_rows[:, None], other=0.0)
        return tl.load(p_tile)
    if CHECK_ROWS:
        return tl.load(p_tile, mask=m_rows[:, None] & (o_cols < COLS)[None, :], other=0.0)
    return tl.load(p_tile, mask=(o_cols < COLS)[None, :], other=0.0)


@triton.jit
def load_columns(p_base, o_rows, o_cols, m_rows, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The same rows as a [BLOCK_COLS, rows] tile, for the right operand of a product.

    Outside a pipelined loop, tl.trans of load_rows would keep the whole operand in every warp's registers.
    """
    p_tile = p_base + (o_rows[None, :] + o_cols[:, None])
    if COLS == BLOCK_COLS:
        return tl.load(p_tile, mask=m_rows[None, :], other=0.0)
    return tl.load(p_tile, mask=m_rows[None, :] & (o_cols < COLS)[:, None], other=0.0)


@triton.jit
def store_rows(p_base, b_tile, o_rows, o_cols, m_rows, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """The converse of load_rows."""
    p_tile = p_base + (o_rows[:, None] + o_cols[None, :])
    if COLS == BLOCK_COLS:
        tl.store(p_tile, b_tile.to(p_base.dtype.element_ty), mask=m_rows[:, None])
    else:
        tl.store(p_tile, b_tile.to(p_base.dtype.element_ty), mask=m_rows[:, None] & (o_cols < COLS)[None, :])


@triton.jit
def aligned(stride_b, stride_h, stride_n, ALIGN: tl.constexpr):
    """The strides, which the caller knows to be multiples of ALIGN elements, in a form that shows it.

    16-byte loads need this. tl.multiple_of on a kernel's argument does not survive the inlining of a helper.
    """
    return stride_b // ALIGN * ALIGN, stride_h // ALIGN * ALIGN, stride_n // ALIGN * ALIGN


@triton.jit
def row_offset(i_row, stride_n, FAR: tl.constexpr):
    """Elements from a sequence's first row to row i_row; in 64 bits only where 32 would not do (FAR)."""
    if FAR:
        i_row = i_row.to(tl.int64)  # not a return of its own: Triton wants all returns of one type
    return i_row * stride_n


@triton.jit
def aligned_bias(stride_b, stride_h, stride_q, stride_k, BIAS_ALIGN: tl.constexpr):
    """The same for a bias with contiguous rows. BIAS_ALIGN = 0: they are not, and are read one by one."""
    if BIAS_ALIGN == 0:
        return stride_b, stride_h, stride_q, stride_k
    return (
        stride_b // BIAS_ALIGN * BIAS_ALIGN,
        stride_h // BIAS_ALIGN * BIAS_ALIGN,
        stride_q // BIAS_ALIGN * BIAS_ALIGN,
        1,
    )


@triton.jit
def sequence_rows(p_cu_seqlens, i_b, longest, total, PACKED: tl.constexpr):
    """(first row, rows, rows the offsets claim) of sequence i_b.

    Packed offsets are clamped to the tensor's rows.
    """
    if PACKED:
        begin = tl.minimum(tl.maximum(tl.load(p_cu_seqlens + i_b), 0), total)
        end = tl.minimum(tl.maximum(tl.load(p_cu_seqlens + i_b + 1), begin), total)
        return begin, tl.minimum(end - begin, longest), end - begin
    return longest * 0, longest, longest


@triton.jit
def visible_keys(
    first_i,
    last_i,
    diagonal,
    seqlen_k,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
):
    """(begin, full_begin, full_end, end) of the keys that queries first_i..last_i see, in tiles of BLOCK_N.

    Keys in full_begin..full_end, multiples of STEP, need no mask: all of these queries see them. begin is a
    multiple of BLOCK_N, which divides STEP; begin ≤ full_begin ≤ full_end, and full_end ≤ end or there is
    nothing beyond full_end. diagonal is seqlen_k − seqlen_q: query i stands at key i + diagonal.
    """
    begin = 0
    end = seqlen_k
    full_begin = 0
    full_end = seqlen_k
    if HAS_RIGHT:
        end = tl.minimum(end, tl.maximum(last_i + diagonal + window_right + 1, 0))
        full_end = tl.minimum(full_end, tl.maximum(first_i + diagonal + window_right + 1, 0))
    if HAS_LEFT:
        begin = tl.maximum(first_i + diagonal - window_left, 0) // BLOCK_N * BLOCK_N
        full_begin = tl.maximum(last_i + diagonal - window_left, 0)
        full_begin = tl.minimum(full_begin, tl.maximum(end, begin))
        full_begin = tl.cdiv(full_begin, STEP) * STEP
    full_end = tl.maximum(full_end // STEP * STEP, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def visible_queries(
    first_j,
    last_j,
    diagonal,
    seqlen_q,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The same for the queries that see keys first_j..last_j: (begin, full_begin, full_end, end)."""
    begin = 0
    end = seqlen_q
    full_begin = 0
    full_end = seqlen_q
    if HAS_LEFT:
        end = tl.minimum(end, tl.maximum(last_j - diagonal + window_left + 1, 0))
        full_end = tl.minimum(full_end, tl.maximum(first_j - diagonal + window_left + 1, 0))
    if HAS_RIGHT:
        begin = tl.maximum(first_j - diagonal - window_right, 0) // BLOCK_M * BLOCK_M
        full_begin = tl.maximum(last_j - diagonal - window_right, 0)
        full_begin = tl.minimum(full_begin, tl.maximum(end, begin))
        full_begin = tl.cdiv(full_begin, BLOCK_M) * BLOCK_M
    full_end = tl.maximum(full_end // BLOCK_M * BLOCK_M, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def seen_keys(
    o_n,
    first_i,
    last_i,
    diagonal,
    len_k,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """True for keys that some query of first_i..last_i sees.

    The others may hold anything and are never loaded.
    """
    m_n = o_n < len_k
    if HAS_RIGHT:
        m_n = m_n & (o_n <= last_i + diagonal + window_right)
    if HAS_LEFT:
        m_n = m_n & (o_n >= first_i + diagonal - window_left)
    return m_n


@triton.jit
def window_mask(
    o_i, o_j, diagonal, seqlen_k, window_left, window_right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """True where key o_j exists and query o_i may see it."""
    m_tile = o_j < seqlen_k
    if HAS_RIGHT:
        m_tile = m_tile & (o_j <= o_i + (diagonal + window_right))
    if HAS_LEFT:
        m_tile = m_tile & (o_j >= o_i + (diagonal - window_left))
    return m_tile


@triton.jit
def tanh(x):
    """A polynomial near 0, where 1 − 2/(e^2x + 1) cancels (coefficients of Cephes' tanhf), that elsewhere."""
    z = x * x
    near = -5.70498872745e-3
    near = near * z + 2.06390887954e-2
    near = near * z - 5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = near * z - 3.33332819422e-1
    far = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near * z * x + x, far)


@triton.jit
def scores(
    b_qk,
    o_i,
    o_j,
    m_in,
    diagonal,
    scale,
    softcap,
    p_bias,
    stride_bias_q,
    stride_bias_k,
    p_relative_bias,
    seqlen_q,
    slope,
    HAS_SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RELATIVE_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
):
    """(scores in base 2, d capped / d scaled product) of the raw products b_qk, before masking.

    p_bias and p_relative_bias point at the (sequence, head)'s first element, m_in says where the tile lies
    inside (seqlen_q, seqlen_k); seqlen_q here is the longest sequence, which the relative bias is indexed by.
    """
    b_slope = 1.0
    if HAS_SOFTCAP:
        b_tanh = tanh(b_qk * (scale / softcap))
        b_s = b_tanh * (softcap * LOG2E)
        b_slope = 1.0 - b_tanh * b_tanh
    else:
        b_s = b_qk * (scale * LOG2E)
    if HAS_BIAS:
        o_bias = o_i.to(tl.int64) * stride_bias_q + o_j.to(tl.int64) * stride_bias_k
        b_bias = tl.load(p_bias + o_bias, mask=m_in, other=0.0)
        b_s += b_bias.to(tl.float32) * LOG2E
    if HAS_RELATIVE_BIAS:
        b_relative = tl.load(p_relative_bias + (o_j - o_i + (seqlen_q - 1)), mask=m_in, other=0.0)
        b_s += b_relative * LOG2E
    if HAS_ALIBI:
        b_s -= (slope * LOG2E) * tl.abs(o_i + diagonal - o_j).to(tl.float32)
    return b_s, b_slope


@triton.jit
def weights(
    b_qk,
    b_lse,
    o_i,
    o_j,
    m_in,
    diagonal,
    len_k,
    window_left,
    window_right,
    scale,
    softcap,
    p_bias,
    stride_bias_q,
    stride_bias_k,
    p_relative_bias,
    seqlen_q,
    slope,
    MASK: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RELATIVE_BIAS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
):
    """(softmax weights, softcap's derivative) of a tile, recomputed from b_lse (see load_lse)."""
    b_s, b_slope = scores(
        b_qk, o_i, o_j, m_in, diagonal, scale, softcap, p_bias, stride_bias_q, stride_bias_k, p_relative_bias,
        seqlen_q, slope, HAS_SOFTCAP, HAS_BIAS, HAS_RELATIVE_BIAS, HAS_ALIBI,
    )  # fmt: skip
    b_p = tl.exp2(b_s - b_lse)
    if MASK:
        m_tile = window_mask(o_i, o_j, diagonal, len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT)
        b_p = tl.where(m_tile, b_p, 0.0)
    return b_p, b_slope


@triton.jit
def load_lse(p_lse, o_m, m_m):
    """lse in base 2, +inf for rows that saw no key or don't exist: their weights come out as exactly 0."""
    b_lse = tl.load(p_lse + o_m, mask=m_m, other=float("-inf")) * LOG2E
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse)


@triton.jit
def fill_rows(
    p_rows,
    p_lse,
    begin,
    end,
    step,
    stride_n,
    value,
    lse,
    COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Write constants into rows begin..end, BLOCK_ROWS of every `step`, and into p_lse unless it is None."""
    o_d = tl.arange(0, BLOCK_COLS)
    for start in range(begin, end, step):
        o_r = start + tl.arange(0, BLOCK_ROWS)
        b_fill = tl.full([BLOCK_ROWS, BLOCK_COLS], value, dtype=tl.float32)
        store_rows(p_rows, b_fill, o_r.to(tl.int64) * stride_n, o_d, o_r < end, COLS, BLOCK_COLS)
        if p_lse is not None:
            tl.store(p_lse + o_r, tl.full([BLOCK_ROWS], lse, dtype=tl.float32), mask=o_r < end)


@triton.jit
def clear_loose_rows(
    p_rows,
    p_lse,
    p_cu_seqlens,
    batch,
    total,
    i_tile,
    tiles,
    stride_n,
    COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Zeros, and −inf for lse, in the packed rows before the first and after the last sequence.

    Tile i_tile of tiles.
    """
    first = tl.minimum(tl.maximum(tl.load(p_cu_seqlens), 0), total)
    last = tl.minimum(tl.maximum(tl.load(p_cu_seqlens + batch), 0), total)
    begin = i_tile * BLOCK_ROWS
    step = tiles * BLOCK_ROWS
    empty = float("-inf")
    fill_rows(p_rows, p_lse, begin, first, step, stride_n, 0.0, empty, COLS, BLOCK_ROWS, BLOCK_COLS)
    fill_rows(p_rows, p_lse, last + begin, total, step, stride_n, 0.0, empty, COLS, BLOCK_ROWS, BLOCK_COLS)
