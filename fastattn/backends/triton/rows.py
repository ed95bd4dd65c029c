"""A batch without its padding and back, one kernel each: rows gathered, or put among rows of zeros.

What torch does with index_select, and with new_zeros and index_copy_ (which writes the tokens' rows twice).
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import on_device
from .prepared import Launch
from .tiles import kernel

_BLOCK_ROWS, _BLOCK_COLUMNS = 16, 256
_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


@kernel
def unpad_kernel(
    p_in,
    p_rows,
    p_out,
    num_rows,  # of p_rows and p_out
    columns,
    ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    columns = columns // ALIGN * ALIGN
    o_r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    m_r = o_r < num_rows
    i_from = tl.load(p_rows + o_r, mask=m_r, other=0)
    copy_rows(p_in, p_out, i_from, o_r, m_r, m_r, columns, BLOCK_COLUMNS)


@kernel
def pad_kernel(
    p_in,
    p_rows,
    p_out,
    num_rows,  # of p_rows and p_in
    height,  # of p_out
    steps,  # halvings that search num_rows + 1 places
    columns,
    ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    columns = columns // ALIGN * ALIGN
    o_r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [BLOCK_ROWS]
    # p_rows ascends: the first token at or behind each position, by halving, is its own or that of another.
    b_low = tl.zeros([BLOCK_ROWS], dtype=tl.int32)
    b_high = b_low + num_rows
    for _ in range(steps):
        b_middle = (b_low + b_high) // 2
        m_open = b_low < b_high
        m_before = m_open & (tl.load(p_rows + b_middle, mask=m_open, other=0) < o_r)
        b_low = tl.where(m_before, b_middle + 1, b_low)
        b_high = tl.where(m_open & (m_before == 0), b_middle, b_high)
    m_token = tl.load(p_rows + b_low, mask=b_low < num_rows, other=-1) == o_r
    copy_rows(p_in, p_out, b_low, o_r, m_token, o_r < height, columns, BLOCK_COLUMNS)


@triton.jit
def copy_rows(p_in, p_out, i_from, i_to, m_from, m_to, columns, BLOCK_COLUMNS: tl.constexpr):
    """Rows i_from of p_in to rows i_to of p_out where m_to; zeros where not m_from."""
    o_from, o_to = i_from.to(tl.int64) * columns, i_to.to(tl.int64) * columns
    for start in tl.range(0, columns, BLOCK_COLUMNS):
        o_c = start + tl.arange(0, BLOCK_COLUMNS)
        m_c = o_c < columns
        b_tile = tl.load(
            p_in + (o_from[:, None] + o_c[None, :]), mask=m_from[:, None] & m_c[None, :], other=0.0
        )  # [BLOCK_ROWS, BLOCK_COLUMNS]
        tl.store(p_out + (o_to[:, None] + o_c[None, :]), b_tile, mask=m_to[:, None] & m_c[None, :])


def unpad(matrix: Tensor, rows: Tensor) -> Tensor:
    """Rows (T,) of a floating-point matrix (R, C): (T, C). rows: int64, each in [0, R), unchecked."""
    return _launch(unpad_kernel, matrix, rows, len(rows))


def pad(packed: Tensor, rows: Tensor, height: int) -> Tensor:
    """(height, C): row i of packed (T, C) at rows[i], zeros elsewhere. rows: int64, strictly ascending."""
    return _launch(pad_kernel, packed, rows, height, height=height, steps=len(rows).bit_length())


def _launch(kernel, matrix: Tensor, rows: Tensor, num_out: int, **more: int) -> Tensor:
    matrix = matrix.contiguous()
    columns = matrix.shape[1]
    out = matrix.new_empty(num_out, columns)
    if out.numel() == 0:
        return out
    wide = 16 // matrix.element_size()
    launch = _prepare(
        kernel, num_out, len(rows), columns, wide if columns % wide == 0 else 1, tuple(more.items()),
        matrix.dtype, matrix.device,
    )  # fmt: skip
    with on_device(matrix.device):
        launch({"p_in": matrix, "p_rows": rows, "p_out": out})
    return out


@functools.lru_cache(maxsize=256)
def _prepare(
    kernel,
    num_out: int,
    num_rows: int,
    columns: int,
    align: int,
    more: tuple[tuple[str, int], ...],
    dtype: torch.dtype,  # for which, and
    device: torch.device,  # for which, the launch keeps code
) -> Launch:
    values = {"num_rows": num_rows, "columns": columns, "ALIGN": align}
    values |= {"BLOCK_ROWS": _BLOCK_ROWS, "BLOCK_COLUMNS": _BLOCK_COLUMNS}
    return Launch(kernel, triton.cdiv(num_out, _BLOCK_ROWS), _OPTIONS, values | dict(more))
