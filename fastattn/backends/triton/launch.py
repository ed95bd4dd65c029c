"""From a problem and its tensors to kernel launches: grids and pointers. No arithmetic on tensors here.

What a launch needs besides addresses is worked out once for each problem and layout of its tensors, and kept.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...problem import AttentionInputs, AttentionProblem
from .. import Gradients
from . import configs, prepared
from .arguments import Layout, alignment, common, far, layout, named_strides, precision
from .backward import delta_kernel
from .bias_backward import dbias_kernel, join_diagonals_kernel
from .configs import Arch, TileConfig
from .decode import merge_kernel
from .forward import forward_kernel
from .key_gradient import dkdv_kernel
from .prepared import Launch
from .query_gradient import dq_kernel

if TYPE_CHECKING:
    from .autotune import TunedLaunch

_KEPT = 1024


def _tiles(rows: int, block: int) -> int:
    return -(-rows // block)


def _blocks(config: TileConfig) -> dict[str, int]:
    return {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}


def tuning() -> bool:
    """Whether tiles are chosen by timing. On GPUs alone: an interpreter's times say nothing."""
    return os.environ.get("FASTATTN_TRITON_AUTOTUNE") == "1" and os.environ.get("TRITON_INTERPRET") != "1"


def _with_tiles(
    kernel,
    make: Callable[[TileConfig], Launch],
    config: TileConfig,
    values: dict[str, object],
    problem: AttentionProblem,
    fixed_rows: bool = False,
) -> Launch | TunedLaunch:
    """make(config), or where tuning is on, what chooses among its neighbours."""
    launch = make(config)
    if not tuning() or launch.programs == 0:
        return launch
    from .autotune import TunedLaunch, candidates, problem_class

    types = (problem.dtype, problem.bias_dtype)
    return TunedLaunch(
        make, candidates(config, fixed_rows), problem_class(kernel, values, types, launch.programs)
    )


def _read_in_kernels(seed: Tensor) -> bool:
    """Whether kernels read the seed: asking a GPU for its value would wait."""
    return seed.device.type != "cpu"


def _score_pointers(problem: AttentionProblem, inputs: AttentionInputs) -> tuple[dict, int | None]:
    """The pointers that stand last in every kernel that computes scores, and the seed."""
    key_mask, seed = inputs.key_mask, inputs.seed
    on_device = seed is not None and seed.device == problem.device and _read_in_kernels(seed)
    pointers = {
        # As words: a byte in what leads to an operand makes Triton lay that operand out for bytes, which
        # costs the tensor cores' fast loads.
        "p_key_mask": None if key_mask is None else key_mask.to(torch.int32),
        "p_bias": inputs.bias,
        "p_relative_bias": inputs.relative_bias,
        "p_alibi": inputs.alibi_slopes,
        "p_cu_q": inputs.cu_seqlens_q,
        "p_cu_k": inputs.cu_seqlens_k,
        "p_seed": seed if on_device else None,
    }
    return pointers, 0 if seed is None or on_device else seed.item() & (2**64 - 1)


# ---- forward


def plan_forward(
    problem: AttentionProblem, arch: Arch, processors: int, precision: str
) -> tuple[TileConfig, bool, int]:
    """(tiles, whether the heads of a kv head share a tile, shares the keys are split into)."""
    group_size = problem.num_heads // problem.num_kv_heads
    rows = problem.seqlen_q * group_size
    itemsize = problem.dtype.itemsize
    if problem.packed or rows > configs.FOLDED_ROWS or problem.seqlen_k < 4 * rows:
        biased = problem.bias_shape is not None or problem.has_relative_bias
        dropout = problem.dropout_p > 0.0
        shaped = (
            biased or dropout or problem.has_key_mask or problem.alibi_shape is not None
            or problem.softcap > 0.0 or problem.softmax_scale <= 0.0
        )  # fmt: skip
        shape = (problem.head_dim, problem.head_dim_v, itemsize)
        lean = not problem.packed and problem.window_left < 0
        tf32 = precision == "tf32"
        config = configs.forward_config(arch, *shape, shaped, biased, lean, tf32, dropout)
        return config, False, 1
    config = configs.decode_config(arch, rows, problem.head_dim, problem.head_dim_v, itemsize)
    tiles = _tiles(rows, config.block_m) * problem.num_kv_heads * problem.batch
    return config, True, configs.decode_splits(tiles, problem.seqlen_k, processors)


class _Forward(NamedTuple):
    attend: Launch | TunedLaunch
    splits: int
    merge: Launch | None


@functools.lru_cache(maxsize=_KEPT)
def _prepare_forward(
    problem: AttentionProblem,
    q: Layout,
    k: Layout,
    v: Layout,
    out: Layout,
    bias: Layout | None,
    precision: str,
    arch: Arch,
    processors: int,
) -> _Forward:
    config, fold_heads, splits = plan_forward(problem, arch, processors, precision)
    heads = problem.num_kv_heads if fold_heads else problem.num_heads
    rows = problem.seqlen_q * (problem.num_heads // problem.num_kv_heads) if fold_heads else problem.seqlen_q
    target, all_rows = out, problem.batch * problem.num_heads * problem.seqlen_q
    if splits > 1:
        shape = (problem.batch, problem.num_heads, problem.seqlen_q, problem.head_dim_v)
        target = shape, (shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1)
    values = common(problem, q, k, v, bias) | named_strides({"o": target})
    values |= {
        "stride_split_out": all_rows * problem.head_dim_v,
        "stride_split_lse": all_rows,
        "num_heads": heads,
        "ALIGN": alignment(problem.dtype, (q, k, v, out)),
        "FAR": far(problem, (k, v)),
        "PRECISION": precision,
        "FOLD_HEADS": fold_heads,
        "splits": splits,
        "SPLIT": splits > 1,
        "POSITIVE_SCALE": problem.softmax_scale > 0.0,
    }

    def attend(tiles: TileConfig) -> Launch:
        programs = _tiles(rows, tiles.block_m) * heads * (problem.batch + problem.packed) * splits
        own = _blocks(tiles) | {"PAIRED": tiles.paired}
        return Launch(forward_kernel, programs, tiles.options(), values | own)

    merge = None
    if splits > 1:
        merged = {
            "splits": splits,
            "num_heads": problem.num_heads,
            "num_rows": problem.seqlen_q,
            "HEAD_DIM_V": problem.head_dim_v,
            "BLOCK_DV": configs.padded_dim(problem.head_dim_v),
        }
        merge = Launch(merge_kernel, all_rows, configs.ONE_WARP.options(), merged | named_strides({"o": out}))
    launch = _with_tiles(forward_kernel, attend, config, values, problem, fold_heads)
    return _Forward(launch, splits, merge)


def forward(
    problem: AttentionProblem,
    inputs: AttentionInputs,
    out: Tensor,
    lse: Tensor | None,
    arch: Arch,
    processors: int,
) -> None:
    """Launch the forward kernel, and the merge where the keys are split."""
    q, k, v = inputs[:3]
    plan = _prepare_forward(
        problem, layout(q), layout(k), layout(v), layout(out), layout(inputs.bias),
        precision(problem.dtype, arch), arch, processors,
    )  # fmt: skip
    if plan.attend.programs == 0:
        if problem.packed:  # no sequence has a row, but there may be rows without a sequence
            out.zero_()
            if lse is not None:
                lse.fill_(float("-inf"))
        return
    pointers, seed = _score_pointers(problem, inputs)
    if plan.merge is None:
        plan.attend({"p_q": q, "p_k": k, "p_v": v, "p_out": out, "p_lse": lse} | pointers, seed)
        return
    shape = (plan.splits, problem.batch, problem.num_heads, problem.seqlen_q)
    parts = out.new_empty((*shape, problem.head_dim_v), dtype=torch.float32)
    parts_lse = out.new_empty(shape, dtype=torch.float32)
    plan.attend({"p_q": q, "p_k": k, "p_v": v, "p_out": parts, "p_lse": parts_lse} | pointers, seed)
    plan.merge({"p_parts": parts, "p_parts_lse": parts_lse, "p_out": out, "p_lse": lse})


# ---- backward


class _Backward(NamedTuple):
    """The launches of the gradients wanted; None for the others."""

    delta: Launch | None
    dq: Launch | TunedLaunch | None
    dkdv: Launch | TunedLaunch | None
    dbias: Launch | None
    diagonals: Launch | None
    join: Launch | None


@functools.lru_cache(maxsize=_KEPT)
def _prepare_backward(
    problem: AttentionProblem,
    q: Layout,
    k: Layout,
    v: Layout,
    out: Layout,
    dout: Layout,
    gradients: tuple[Layout | None, ...],
    bias: Layout | None,
    precision: str,
    arch: Arch,
) -> _Backward:
    dq, dk, dv, dbias, drelative_bias = gradients
    align = alignment(problem.dtype, (q, k, v, out, dout, dq, dk, dv))
    shape = (problem.head_dim, problem.head_dim_v, problem.dtype.itemsize)
    choice = (arch, *shape, precision == "tf32", problem.bias_shape is not None)
    heads, kv_heads = problem.num_heads, problem.num_kv_heads
    sequences = problem.batch + problem.packed  # the packed rows without a sequence count as one more
    values = common(problem, q, k, v, bias) | named_strides({"g": dout})
    values |= {"ALIGN": align, "PRECISION": precision, "num_heads": heads}
    offsets = {"FAR": far(problem, (q, k, v, dout))}
    launches: dict[str, Launch | TunedLaunch | None] = dict.fromkeys(_Backward._fields)
    if any(x is not None for x in (dq, dk, dbias, drelative_bias)):
        launches["delta"] = _prepare_delta(problem, out, dout, align)
    if dq is not None:
        own_dq = values | offsets | named_strides({"dq": dq})

        def by_queries(tiles: TileConfig) -> Launch:
            programs = _tiles(problem.seqlen_q, tiles.block_m) * heads * sequences
            return Launch(dq_kernel, programs, tiles.options(), own_dq | _blocks(tiles))

        launches["dq"] = _with_tiles(dq_kernel, by_queries, configs.dq_config(*choice), own_dq, problem)
    if dk is not None or dv is not None:
        own_dkdv = values | offsets | named_strides({"dk": dk, "dv": dv})
        own_dkdv |= {"num_heads": kv_heads, "GROUPED": heads > kv_heads}
        own_dkdv |= {"WANT_DK": dk is not None, "WANT_DV": dv is not None}

        def by_keys(tiles: TileConfig) -> Launch:
            programs = _tiles(problem.seqlen_k, tiles.block_n) * kv_heads * sequences
            return Launch(dkdv_kernel, programs, tiles.options(), own_dkdv | _blocks(tiles))

        config = configs.dkdv_config(*choice, problem.dropout_p > 0.0, problem.has_relative_bias)
        launches["dkdv"] = _with_tiles(dkdv_kernel, by_keys, config, own_dkdv, problem)
    config = configs.bias_config(arch, *shape)
    block = config.block_m
    own = {"BLOCK": block, "DIAGONAL": False, "REDUCE_Q": False, "REDUCE_K": False}
    if dbias is not None:
        bias_batch, bias_heads, rows, columns = dbias[0]
        programs = bias_batch * bias_heads * _tiles(rows, block) * _tiles(columns, block)
        own |= {"REDUCE_Q": rows == 1, "REDUCE_K": columns == 1}
        own |= {"bias_batch": bias_batch, "bias_heads": bias_heads}
        launches["dbias"] = Launch(dbias_kernel, programs, config.options(), values | own)
    if drelative_bias is not None:
        tiles_m, tiles_n = _tiles(problem.seqlen_q, block), _tiles(problem.seqlen_k, block)
        programs = heads * (tiles_m + tiles_n - 1) if tiles_m and tiles_n else 0
        own |= {"DIAGONAL": True, "REDUCE_Q": False, "REDUCE_K": False}
        own |= {"bias_batch": 1, "bias_heads": heads}
        launches["diagonals"] = Launch(dbias_kernel, programs, config.options(), values | own)
        joined = {"seqlen_q": problem.seqlen_q, "seqlen_k": problem.seqlen_k, "BLOCK": block}
        programs = heads * _tiles(drelative_bias[0][1], block)
        launches["join"] = Launch(join_diagonals_kernel, programs, configs.ONE_WARP.options(), joined)
    return _Backward(**launches)


def _prepare_delta(problem: AttentionProblem, out: Layout, dout: Layout, align: int) -> Launch:
    sequences, rows = (1, problem.total_q) if problem.packed else (problem.batch, problem.seqlen_q)
    programs = _tiles(rows, configs.DELTA_TILES.block_m) * problem.num_heads * sequences
    values = named_strides({"o": out, "g": dout}) | {
        "num_heads": problem.num_heads,
        "num_rows": rows,
        "HEAD_DIM_V": problem.head_dim_v,
        "BLOCK_M": configs.DELTA_TILES.block_m,
        "BLOCK_DV": configs.padded_dim(problem.head_dim_v),
        "ALIGN": align,
    }
    return Launch(delta_kernel, programs, configs.DELTA_TILES.options(), values)


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
    q, k, v = inputs[:3]
    dq, dk, dv, dbias, drelative_bias = gradients
    plan = _prepare_backward(
        problem, layout(q), layout(k), layout(v), layout(out), layout(dout), tuple(map(layout, gradients)),
        layout(inputs.bias), precision(problem.dtype, arch), arch,
    )  # fmt: skip
    delta = None
    if plan.delta is not None:
        delta = torch.empty_like(lse)  # rowsum(out ∘ dout) − dlse
        if plan.delta.programs:
            plan.delta({"p_out": out, "p_dout": dout, "p_dlse": dlse, "p_delta": delta})
    first = {"p_q": q, "p_k": k, "p_v": v, "p_dout": dout, "p_lse": lse, "p_delta": delta}
    last, seed = _score_pointers(problem, inputs)
    if plan.dq is not None:
        _launch_or_zero(plan.dq, first | {"p_dq": dq} | last, seed, (dq,))
    if plan.dkdv is not None:
        _launch_or_zero(plan.dkdv, first | {"p_dk": dk, "p_dv": dv} | last, seed, (dk, dv))
    if plan.dbias is not None and plan.dbias.programs:
        plan.dbias(first | {"p_dbias": dbias} | last, seed)
    if plan.diagonals is not None and drelative_bias.numel():
        if plan.diagonals.programs == 0:
            drelative_bias.zero_()
            return
        block = configs.bias_config(
            arch, problem.head_dim, problem.head_dim_v, problem.dtype.itemsize
        ).block_m
        parts = drelative_bias.new_empty((plan.diagonals.programs, 2, block))
        plan.diagonals(first | {"p_dbias": parts} | last, seed)
        plan.join({"p_parts": parts, "p_drelative": drelative_bias})


def _launch_or_zero(
    launch: Launch | TunedLaunch,
    pointers: dict[str, Tensor | None],
    seed: int | None,
    results: tuple[Tensor | None, ...],
) -> None:
    """Packed rows without a sequence are the kernel's to clear, if there is a sequence to launch it for."""
    if launch.programs:
        launch(pointers, seed)
        return
    for result in results:
        if result is not None:
            result.zero_()


def forget() -> None:
    """Drop what was prepared: for tests that put something in a kernel's place."""
    _prepare_forward.cache_clear()
    _prepare_backward.cache_clear()
    prepared.forget()
