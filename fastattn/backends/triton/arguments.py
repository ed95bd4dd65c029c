"""What the kernels are told of a problem besides addresses: sizes, switches, strides, alignments.

Pure functions of the problem and of how its tensors lie in memory, so that launch.py can remember the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...philox import drop_threshold, keep_scale
from ...problem import AttentionProblem
from . import configs

Layout = tuple[tuple[int, ...], tuple[int, ...]]  # (shape, strides in elements)


def layout(x: Tensor | None) -> Layout | None:
    return None if x is None else (x.shape, x.stride())


def precision(dtype: torch.dtype, arch: configs.Arch) -> str:
    """TF32 only where torch would use it for a matrix product, and where the part has it."""
    if (
        dtype == torch.float32
        and torch.get_float32_matmul_precision() != "highest"
        and configs.has_tf32(arch)
    ):
        return "tf32"
    return "ieee"


def strides(x: Layout) -> tuple[int, int, int]:
    """Elements from one sequence, head and row to the next; an axis of one element has none."""
    shape, stride = x
    if len(shape) == 3:
        shape, stride = (1, shape[1], shape[0]), (0, stride[1], stride[0])
    return tuple(step if size > 1 else 0 for size, step in zip(shape[:3], stride[:3], strict=True))


def named_strides(names: dict[str, Layout | None]) -> dict[str, int]:
    """stride_<name>b, h and n of each tensor; zeros for one that is absent."""
    found = {}
    for name, x in names.items():
        b, h, n = (0, 0, 0) if x is None else strides(x)
        found |= {f"stride_{name}b": b, f"stride_{name}h": h, f"stride_{name}n": n}
    return found


def alignment(dtype: torch.dtype, tensors: tuple[Layout | None, ...]) -> int:
    """Elements in 16 bytes if every row of every tensor can be read in such pieces, else 1."""
    elements = 16 // dtype.itemsize
    steps = (step for x in tensors if x is not None for step in strides(x))
    return elements if all(step % elements == 0 for step in steps) else 1


def far(problem: AttentionProblem, tensors: tuple[Layout | None, ...]) -> bool:
    """Whether rows of one sequence lie so far apart that 32 bits don't hold their offsets."""
    longest = max(problem.seqlen_q, problem.seqlen_k)
    return any(longest * strides(x)[2] >= 2**31 for x in tensors if x is not None)


def common(
    problem: AttentionProblem, q: Layout, k: Layout, v: Layout, bias: Layout | None
) -> dict[str, object]:
    """The arguments that forward and backward kernels are given alike, but for pointers and the seed."""
    longest = problem.seqlen_q + problem.seqlen_k
    right = 0 if problem.causal else problem.window_right
    heads = problem.num_heads
    return {
        "batch": problem.batch,
        "group_size": heads // problem.num_kv_heads,
        "seqlen_q": problem.seqlen_q,
        "seqlen_k": problem.seqlen_k,
        "total_q": problem.total_q,
        "total_k": problem.total_k,
        # Kernels count in 32 bits: a window wider than the sequences is as wide as they are.
        "window_left": min(problem.window_left, longest),
        "window_right": min(right, longest),
        "scale": problem.softmax_scale,
        "softcap": problem.softcap,
        "drop_below": drop_threshold(problem.dropout_p),
        "keep_scale": keep_scale(problem.dropout_p),
        "HEAD_DIM": problem.head_dim,
        "HEAD_DIM_V": problem.head_dim_v,
        "BLOCK_D": configs.padded_dim(problem.head_dim),
        "BLOCK_DV": configs.padded_dim(problem.head_dim_v),
        "PACKED": problem.packed,
        "HAS_LEFT": problem.window_left >= 0,
        "HAS_RIGHT": right >= 0,
        "HAS_KEY_MASK": problem.has_key_mask,
        "HAS_BIAS": problem.bias_shape is not None,
        "HAS_RELATIVE_BIAS": problem.has_relative_bias,
        "HAS_ALIBI": problem.alibi_shape is not None,
        "HAS_SOFTCAP": problem.softcap > 0.0,
        "HAS_DROPOUT": problem.dropout_p > 0.0,
        "stride_lse_b": 0 if problem.packed else heads * problem.seqlen_q,
        "stride_lse_h": problem.total_q if problem.packed else problem.seqlen_q,
        "stride_mask_b": problem.seqlen_k,
        # relative_bias and alibi_slopes come contiguous.
        "stride_relative_h": longest - 1 if problem.has_relative_bias else 0,
        "stride_alibi_b": heads if len(problem.alibi_shape or ()) == 2 else 0,
        "stride_alibi_h": 0 if problem.alibi_shape is None else 1,
    } | _of_bias(problem, bias) | named_strides({"q": q, "k": k, "v": v})  # fmt: skip


def _of_bias(problem: AttentionProblem, bias: Layout | None) -> dict[str, int]:
    steps, align = (0, 0, 0, 0), 0
    if bias is not None:
        shape, stride = bias
        steps = tuple(step if size > 1 else 0 for size, step in zip(shape, stride, strict=True))
        if steps[3] == 1:
            elements = 16 // problem.bias_dtype.itemsize
            align = elements if all(step % elements == 0 for step in steps[:3]) else 1
    names = ("stride_bias_b", "stride_bias_h", "stride_bias_q", "stride_bias_k")
    return dict(zip(names, steps, strict=True)) | {"BIAS_ALIGN": align}
