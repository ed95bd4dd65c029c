"""From a problem and its tensors to kernel launches.

Grids, constexprs, strides. No arithmetic on tensors here.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...philox import drop_threshold, keep_scale
from ...problem import AttentionInputs, AttentionProblem
from .. import Gradients
from . import configs
from .backward import delta_kernel, dkdv_kernel, dq_kernel
from .bias_backward import dbias_kernel, join_diagonals_kernel
from .configs import Arch, TileConfig
from .decode import merge_kernel
from .forward import forward_kernel

_CACHED_PROBLEMS = 4096


@functools.lru_cache(maxsize=_CACHED_PROBLEMS)
def _fixed_arguments(problem: AttentionProblem) -> dict[str, object]:
    """The arguments that every kernel takes and that the problem alone decides."""
    longest = problem.seqlen_q + problem.seqlen_k
    right = problem.window_right
    if problem.causal:
        right = 0
    return {
        "batch": problem.batch,
        "group_size": problem.num_heads // problem.num_kv_heads,
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
    }


def _precision(dtype: torch.dtype) -> str:
    """TF32 only where torch would use it for a matrix product."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Elements from one sequence, head and row to the next; an axis of one element has none."""
    if x.dim() == 3:
        rows, heads, _ = x.stride()
        return 0, heads if x.shape[1] > 1 else 0, rows if x.shape[0] > 1 else 0
    return tuple(x.stride(axis) if x.shape[axis] > 1 else 0 for axis in range(3))


def _alignment(tensors: tuple[Tensor | None, ...]) -> int:
    """Elements in 16 bytes if every row of every tensor can be read in such pieces, else 1."""
    present = [x for x in tensors if x is not None]
    elements = 16 // present[0].element_size()
    return elements if all(stride % elements == 0 for x in present for stride in _strides(x)) else 1


def _bias_alignment(bias: Tensor, strides: tuple[int, ...]) -> int:
    """Elements in 16 bytes if the bias's contiguous rows can be read in such pieces, else 1."""
    elements = 16 // bias.element_size()
    return elements if all(stride % elements == 0 for stride in strides[:3]) else 1


def _named_strides(names: dict[str, Tensor | None]) -> dict[str, int]:
    strides = {}
    for name, x in names.items():
        b, h, n = (0, 0, 0) if x is None else _strides(x)
        strides |= {f"stride_{name}b": b, f"stride_{name}h": h, f"stride_{name}n": n}
    return strides


def _arguments(problem: AttentionProblem, inputs: AttentionInputs) -> dict[str, object]:
    """What forward and backward kernels are given alike."""
    key_mask, bias, slopes, seed = inputs.key_mask, inputs.bias, inputs.alibi_slopes, inputs.seed
    bias_strides = (0, 0, 0, 0)
    if bias is not None:
        bias_strides = tuple(bias.stride(axis) if bias.shape[axis] > 1 else 0 for axis in range(4))
    on_device = seed is not None and seed.device == problem.device and problem.device.type != "cpu"
    return (
        _fixed_arguments(problem)
        | {
            "p_q": inputs.q,
            "p_k": inputs.k,
            "p_v": inputs.v,
            # As words: a byte in what leads to an operand makes Triton lay that operand out for bytes, which
            # costs the tensor cores' fast loads.
            "p_key_mask": None if key_mask is None else key_mask.to(torch.int32),
            "p_bias": bias,
            "p_relative_bias": inputs.relative_bias,
            "p_alibi": slopes,
            "p_cu_q": inputs.cu_seqlens_q,
            "p_cu_k": inputs.cu_seqlens_k,
            # A seed on the device is read there: asking for its value would wait.
            "p_seed": seed if on_device else None,
            "seed": 0 if seed is None or on_device else seed.item() & (2**64 - 1),
            "stride_lse_b": 0 if problem.packed else problem.num_heads * problem.seqlen_q,
            "stride_lse_h": problem.total_q if problem.packed else problem.seqlen_q,
            "stride_mask_b": problem.seqlen_k,
            "stride_bias_b": bias_strides[0],
            "stride_bias_h": bias_strides[1],
            "stride_bias_q": bias_strides[2],
            "stride_bias_k": bias_strides[3],
            "stride_relative_h": 0 if inputs.relative_bias is None else inputs.relative_bias.stride(0),
            "stride_alibi_b": slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
            "stride_alibi_h": 0 if slopes is None else slopes.stride(-1),
            "BIAS_ALIGN": 0 if bias is None or bias_strides[3] != 1 else _bias_alignment(bias, bias_strides),
            "PRECISION": _precision(problem.dtype),
        }
        | _named_strides({"q": inputs.q, "k": inputs.k, "v": inputs.v})
    )


def _tiles(rows: int, block: int) -> int:
    return -(-rows // block)


def plan_forward(problem: AttentionProblem, arch: Arch, processors: int) -> tuple[TileConfig, bool, int]:
    """(tiles, whether the heads of a kv head share a tile, shares the keys are split into)."""
    group_size = problem.num_heads // problem.num_kv_heads
    rows = problem.seqlen_q * group_size
    itemsize = problem.dtype.itemsize
    if problem.packed or rows > configs.FOLDED_ROWS or problem.seqlen_k < 4 * rows:
        shaped = (
            problem.has_key_mask or problem.bias_shape is not None or problem.has_relative_bias
            or problem.alibi_shape is not None or problem.softcap > 0.0 or problem.dropout_p > 0.0
        )  # fmt: skip
        config = configs.forward_config(arch, problem.head_dim, problem.head_dim_v, itemsize, shaped)
        return config, False, 1
    config = configs.decode_config(arch, rows, problem.head_dim, problem.head_dim_v, itemsize)
    tiles = _tiles(rows, config.block_m) * problem.num_kv_heads * problem.batch
    return config, True, configs.decode_splits(tiles, problem.seqlen_k, processors)


def forward(
    problem: AttentionProblem,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor | None,
    arch: Arch,
    processors: int,
) -> None:
    """Launch the forward kernel, and the merge where the keys are split."""
    config, fold_heads, splits = plan_forward(problem, arch, processors)
    heads = problem.num_kv_heads if fold_heads else problem.num_heads
    rows = problem.seqlen_q * (problem.num_heads // problem.num_kv_heads) if fold_heads else problem.seqlen_q
    programs = _tiles(rows, config.block_m) * heads * (problem.batch + problem.packed) * splits
    if problem.packed and programs == 0:
        # No sequence has a row, but there may be rows without a sequence.
        out.zero_()
        if lse is not None:
            lse.fill_(float("-inf"))
        return
    if programs == 0:
        return
    target, target_lse = out, lse
    if splits > 1:
        shape = (problem.batch, problem.num_heads, problem.seqlen_q)
        parts = out.new_empty((splits, *shape, problem.head_dim_v), dtype=torch.float32)
        parts_lse = out.new_empty((splits, *shape), dtype=torch.float32)
        target, target_lse = parts, parts_lse
    arguments = _arguments(problem, inputs) | _named_strides({"o": target if splits == 1 else target[0]})
    arguments |= {
        "p_out": target,
        "p_lse": target_lse,
        "stride_split_out": target.numel() // splits,
        "stride_split_lse": problem.batch * problem.num_heads * problem.seqlen_q,
        "num_heads": heads,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "ALIGN": _alignment((inputs.q, inputs.k, inputs.v, out)),
        "FOLD_HEADS": fold_heads,
        "SPLITS": splits,
        "POSITIVE_SCALE": problem.softmax_scale > 0.0,
    }
    forward_kernel[(programs,)](**arguments, **config.options())
    if splits > 1:
        merge_kernel[(problem.batch * problem.num_heads * problem.seqlen_q,)](
            p_parts=parts,
            p_parts_lse=parts_lse,
            p_out=out,
            p_lse=lse,
            splits=splits,
            num_heads=problem.num_heads,
            num_rows=problem.seqlen_q,
            HEAD_DIM_V=problem.head_dim_v,
            BLOCK_DV=configs.padded_dim(problem.head_dim_v),
            num_warps=1,
            **_named_strides({"o": out}),
        )


def backward(
    problem: AttentionProblem,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    gradients: Gradients,
    arch: Arch,
) -> None:
    """Launch the kernels whose gradients are wanted, and no other."""
    dq, dk, dv, dbias, drelative_bias = gradients
    arguments = _arguments(problem, inputs) | _named_strides({"g": dout})
    arguments |= {"p_dout": dout, "p_lse": lse, "p_delta": None}
    arguments["ALIGN"] = _alignment((inputs.q, inputs.k, inputs.v, out, dout, dq, dk, dv))
    shape = (problem.head_dim, problem.head_dim_v, problem.dtype.itemsize)
    if any(gradient is not None for gradient in (dq, dk, dbias, drelative_bias)):
        arguments["p_delta"] = _delta(problem, out, dout, lse, dlse, arguments["ALIGN"])
    sequences = problem.batch + problem.packed  # the packed rows without a sequence count as one more
    if dq is not None:
        config = configs.dq_config(arch, *shape)
        programs = _tiles(problem.seqlen_q, config.block_m) * problem.num_heads * sequences
        own = _named_strides({"dq": dq}) | {"p_dq": dq, "num_heads": problem.num_heads}
        _launch_or_zero(dq_kernel, programs, config, (dq,), arguments | own)
    if dk is not None or dv is not None:
        config = configs.dkdv_config(arch, *shape)
        programs = _tiles(problem.seqlen_k, config.block_n) * problem.num_kv_heads * sequences
        own = _named_strides({"dk": dk, "dv": dv}) | {"p_dk": dk, "p_dv": dv}
        own |= {"num_heads": problem.num_kv_heads, "WANT_DK": dk is not None, "WANT_DV": dv is not None}
        own["GROUPED"] = problem.num_heads > problem.num_kv_heads
        _launch_or_zero(dkdv_kernel, programs, config, (dk, dv), arguments | own)
    config = configs.bias_config(arch, *shape)
    arguments["num_heads"] = problem.num_heads
    if dbias is not None:
        _bias_gradient(problem, arguments, dbias, config)
    if drelative_bias is not None:
        _relative_bias_gradient(problem, arguments, drelative_bias, config)


def _launch_or_zero(
    kernel, programs: int, config: TileConfig, results: tuple[Tensor | None, ...], arguments
) -> None:
    """Packed rows without a sequence are the kernel's to clear, if there is a sequence to launch it for."""
    if programs:
        kernel[(programs,)](**arguments, BLOCK_M=config.block_m, BLOCK_N=config.block_n, **config.options())
        return
    for result in results:
        if result is not None:
            result.zero_()


def _delta(
    problem: AttentionProblem, out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None, align: int
) -> Tensor:
    """fp32 of lse's shape: rowsum(out ∘ dout) − dlse."""
    delta = torch.empty_like(lse)
    sequences, rows = (1, problem.total_q) if problem.packed else (problem.batch, problem.seqlen_q)
    block_m = 32
    programs = _tiles(rows, block_m) * problem.num_heads * sequences
    if programs:
        delta_kernel[(programs,)](
            p_out=out,
            p_dout=dout,
            p_dlse=dlse,
            p_delta=delta,
            num_heads=problem.num_heads,
            num_rows=rows,
            HEAD_DIM_V=problem.head_dim_v,
            BLOCK_M=block_m,
            BLOCK_DV=configs.padded_dim(problem.head_dim_v),
            ALIGN=align,
            num_warps=4,
            **_named_strides({"o": out, "g": dout}),
        )
    return delta


def _bias_gradient(problem: AttentionProblem, arguments: dict, dbias: Tensor, config: TileConfig) -> None:
    bias_batch, bias_heads, rows, columns = dbias.shape
    block = config.block_m
    programs = bias_batch * bias_heads * _tiles(rows, block) * _tiles(columns, block)
    if programs == 0:
        return
    dbias_kernel[(programs,)](
        **arguments,
        p_dbias=dbias,
        bias_batch=bias_batch,
        bias_heads=bias_heads,
        BLOCK=block,
        DIAGONAL=False,
        REDUCE_Q=rows == 1,
        REDUCE_K=columns == 1,
        **config.options(),
    )


def _relative_bias_gradient(
    problem: AttentionProblem, arguments: dict, drelative_bias: Tensor, config: TileConfig
) -> None:
    if drelative_bias.numel() == 0:
        return
    block = config.block_m
    tiles_m, tiles_n = _tiles(problem.seqlen_q, block), _tiles(problem.seqlen_k, block)
    if tiles_m == 0 or tiles_n == 0:
        drelative_bias.zero_()
        return
    parts = drelative_bias.new_empty((problem.num_heads, tiles_m + tiles_n - 1, 2, block))
    dbias_kernel[(problem.num_heads * (tiles_m + tiles_n - 1),)](
        **arguments,
        p_dbias=parts,
        bias_batch=1,
        bias_heads=problem.num_heads,
        BLOCK=block,
        DIAGONAL=True,
        REDUCE_Q=False,
        REDUCE_K=False,
        **config.options(),
    )
    join_diagonals_kernel[(problem.num_heads * _tiles(drelative_bias.shape[1], block),)](
        p_parts=parts,
        p_drelative=drelative_bias,
        seqlen_q=problem.seqlen_q,
        seqlen_k=problem.seqlen_k,
        BLOCK=block,
        num_warps=1,
    )
