"""The structs of csrc/fastattn.h as bytes.

The library only reads them, so a call packs its numbers straight into the bytes that it passes: an order of
magnitude cheaper than filling ctypes structures field by field, and a small problem takes as long as such
things do.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ...problem import AttentionInputs, AttentionProblem

ABI_VERSION = 1
STATUS_OK, STATUS_INVALID_ARGUMENT, STATUS_UNSUPPORTED, STATUS_OUT_OF_MEMORY = range(4)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
F32_BF16_PRODUCTS, F32_SPLIT_PRODUCTS = 3, 4
PROBLEM_DTYPES = (*DTYPES.values(), F32_BF16_PRODUCTS, F32_SPLIT_PRODUCTS)

# Native byte order and alignment; i int32, I uint32, q int64, Q uint64 or a pointer, f float.
_TENSOR = "Qqqq"  # data, stride_b, stride_h, stride_n
_BIAS = "Qqqqq"  # data, stride_b, stride_h, stride_q, stride_k
_PROBLEM_FIXED = (
    "Ii"  # struct_size, dtype
    "qqqqqqq"  # batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v
    "fffi"  # softmax_scale, softcap, dropout_p, causal
    "qq"  # window_left, window_right
)
_PROBLEM_OPTIONAL = (
    "Q"  # dropout_seed
    "QQqq"  # cu_seqlens_q, cu_seqlens_k, total_q, total_k
    "Qq"  # key_mask, key_mask_stride_b
    f"{_BIAS}ii"  # bias, bias_dtype, reserved0
    "Qq"  # relative_bias, relative_bias_stride_h
    "Qqq"  # alibi_slopes, alibi_stride_b, alibi_stride_h
    # and last q, k, v
)
_FORWARD = struct.Struct(f"@II{_TENSOR}Qqq")  # struct_size, reserved0, out, lse with strides
_BACKWARD = struct.Struct(
    "@II"  # struct_size, reserved0
    f"{_TENSOR * 2}"  # out, dout
    "QqqQqq"  # lse with strides, dlse with strides
    f"{_TENSOR * 3}"  # dq, dk, dv
    f"{_BIAS}"  # dbias
    "Qq"  # drelative_bias, drelative_bias_stride_h
)
_HIDDEN_DROPOUT = struct.Struct("@IiQQqqqqQQfI")  # as fastattn_hidden_dropout lists them
_ROTARY = struct.Struct(
    "@Iiii"  # struct_size, dtype, table_dtype, transposed
    "qqqqqq"  # batch, num_heads, num_kv_heads, seqlen, head_dim, rotary_dim
    f"{_TENSOR * 4}"  # q, k, q_out, k_out
    "QqqQqq"  # cos with strides, sin with strides
)
_LINEAR = struct.Struct("@IiiiqqqQqQqQQq")  # as fastattn_linear lists them
_EXECUTOR = struct.Struct("@Qi4x")  # parallel_for, num_threads, padding
_FIXED = struct.Struct("@" + _PROBLEM_FIXED)
_OPTIONAL = struct.Struct("@" + _PROBLEM_OPTIONAL)
_QKV = struct.Struct("@" + _TENSOR * 3)
_PROBLEM_SIZE = _FIXED.size + _OPTIONAL.size + _QKV.size  # every part begins and ends on eight bytes

_NO_TENSOR = (0, 0, 0, 0)
_NO_BIAS = (0, 0, 0, 0, 0)
_NOTHING_OPTIONAL = (None,) * 7


def fixed_part(problem: AttentionProblem, dtype: int | None = None) -> bytes:
    """The front of fastattn_problem, the same for every call: all but q, k, v and optional tensors.

    dtype: that of the problem, or one that says how products of fp32 matrices are taken.
    """
    fixed = _FIXED.pack(
        _PROBLEM_SIZE,
        DTYPES[problem.dtype] if dtype is None else dtype,
        problem.batch,
        problem.num_heads,
        problem.num_kv_heads,
        problem.seqlen_q,
        problem.seqlen_k,
        problem.head_dim,
        problem.head_dim_v,
        problem.softmax_scale,
        problem.softcap,
        problem.dropout_p,
        problem.causal,
        problem.window_left,
        problem.window_right,
    )
    return fixed if problem.has_optional_tensors else fixed + _optional_part(problem, _NOTHING_OPTIONAL)


def problem_struct(fixed: bytes, problem: AttentionProblem, inputs: AttentionInputs) -> bytes:
    """fastattn_problem: `fixed` with the addresses and strides of this call."""
    if problem.has_optional_tensors:
        fixed += _optional_part(problem, inputs[3:])
    q, k, v = inputs[:3]
    return fixed + _QKV.pack(*_tensor(q), *_tensor(k), *_tensor(v))


def _optional_part(problem: AttentionProblem, tensors: tuple[Tensor | None, ...]) -> bytes:
    key_mask, bias, relative_bias, alibi_slopes, cu_seqlens_q, cu_seqlens_k, seed = tensors
    return _OPTIONAL.pack(
        0 if seed is None else int(seed) & 0xFFFFFFFFFFFFFFFF,
        0 if cu_seqlens_q is None else cu_seqlens_q.data_ptr(),
        0 if cu_seqlens_k is None else cu_seqlens_k.data_ptr(),
        problem.total_q,
        problem.total_k,
        0 if key_mask is None else key_mask.data_ptr(),
        0 if key_mask is None else key_mask.stride(0),
        *(_NO_BIAS if bias is None else _bias(bias)),
        0 if bias is None else DTYPES[bias.dtype],
        0,
        0 if relative_bias is None else relative_bias.data_ptr(),
        0 if relative_bias is None else relative_bias.stride(0),
        0 if alibi_slopes is None else alibi_slopes.data_ptr(),
        0 if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes.stride(0),
        0 if alibi_slopes is None else alibi_slopes.stride(-1),
    )


def forward_struct(out: Tensor, lse: Tensor | None) -> bytes:
    """fastattn_forward_result."""
    return _FORWARD.pack(_FORWARD.size, 0, *_tensor(out), *_row_statistics(lse))


def backward_struct(out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None, gradients) -> bytes:
    """fastattn_backward_io."""
    dq, dk, dv, dbias, drelative_bias = gradients
    return _BACKWARD.pack(
        _BACKWARD.size,
        0,
        *_tensor(out),
        *_tensor(dout),
        *_row_statistics(lse),
        *_row_statistics(dlse),
        *(_NO_TENSOR if dq is None else _tensor(dq)),
        *(_NO_TENSOR if dk is None else _tensor(dk)),
        *(_NO_TENSOR if dv is None else _tensor(dv)),
        *(_NO_BIAS if dbias is None else _bias(dbias)),
        0 if drelative_bias is None else drelative_bias.data_ptr(),
        0 if drelative_bias is None else drelative_bias.stride(0),
    )


def hidden_dropout_struct(
    x: Tensor, out: Tensor, dropout_p: float, seed: int, seqlen: int, cu_seqlens: Tensor | None
) -> bytes:
    """fastattn_hidden_dropout, for contiguous (rows, columns) tensors."""
    return _HIDDEN_DROPOUT.pack(
        _HIDDEN_DROPOUT.size,
        DTYPES[x.dtype],
        x.data_ptr(),
        out.data_ptr(),
        *x.shape,
        seqlen,
        0 if cu_seqlens is None else len(cu_seqlens) - 1,
        0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        seed & 0xFFFFFFFFFFFFFFFF,
        dropout_p,
        0,
    )


def rotary_struct(
    xs: Sequence[Tensor], outs: Sequence[Tensor], cos: Tensor, sin: Tensor, transposed: bool
) -> bytes:
    """fastattn_rotary, for tensors of unit last stride; xs and outs hold one or two."""
    q, k = xs[0], xs[1] if len(xs) == 2 else None
    batch, num_heads, seqlen, head_dim = q.shape
    return _ROTARY.pack(
        _ROTARY.size,
        DTYPES[q.dtype],
        DTYPES[cos.dtype],
        transposed,
        batch,
        num_heads,
        0 if k is None else k.shape[1],
        seqlen,
        head_dim,
        cos.shape[2],
        *_tensor(q),
        *(_NO_TENSOR if k is None else _tensor(k)),
        *_tensor(outs[0]),
        *(_NO_TENSOR if k is None else _tensor(outs[1])),
        *_table(cos),
        *_table(sin),
    )


def linear_struct(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, gelu: bool, transposed: bool
) -> bytes:
    """fastattn_linear, for tensors of unit last stride."""
    return _LINEAR.pack(
        _LINEAR.size,
        transposed,
        gelu,
        0,
        *x.shape,
        out.shape[1],
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        weight.stride(0),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        out.stride(0),
    )


def _table(x: Tensor) -> tuple[int, int, int]:
    """Address, batch and position stride of (B, N, D_rot); the first is 0 where B is 1 for all."""
    return x.data_ptr(), x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)


def executor_struct(parallel_for: int, num_threads: int) -> bytes:
    """fastattn_executor; parallel_for is a function's address, 0 for the library's own pool."""
    return _EXECUTOR.pack(parallel_for, num_threads)


def _tensor(x: Tensor) -> tuple[int, int, int, int]:
    strides = x.stride()
    if len(strides) == 4:
        return x.data_ptr(), strides[0], strides[1], strides[2]
    return x.data_ptr(), 0, strides[1], strides[0]  # packed: (row, head, dim)


def _bias(x: Tensor) -> tuple[int, int, int, int, int]:
    """Stride 0 on the axes that broadcast."""
    return x.data_ptr(), *(
        0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)
    )


def _row_statistics(x: Tensor | None) -> tuple[int, int, int]:
    """Address, batch and head stride of lse or dlse, which are contiguous."""
    if x is None:
        return 0, 0, 0
    return x.data_ptr(), x.stride(0) if x.dim() == 3 else 0, x.stride(-2)
