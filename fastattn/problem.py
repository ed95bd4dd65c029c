"""AttentionProblem: what is to be computed, and the one place that validates it.

`describe` looks at tensors once and gives the same object again for the same shapes, dtypes, devices and
options, so a training step pays for validation only the first time and backends can key what they prepare by
the object itself.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import InvalidArgumentError
from .philox import drop_threshold

MAX_HEAD_DIM = 256
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPE_NAMES = "float32, bfloat16, float16 (float64 in the reference)"
_CACHE_SIZE = 1024


class AttentionInputs(NamedTuple):
    """The tensors of a problem; absent ones are None. Which go together is for `validate` to say."""

    q: Tensor  # padded (B, Hq, Nq, D); packed (total_q, Hq, D)
    k: Tensor  # padded (B, Hkv, Nk, D); packed (total_k, Hkv, D)
    v: Tensor  # padded (B, Hkv, Nk, Dv); packed (total_k, Hkv, Dv)
    key_mask: Tensor | None = None  # bool (B, Nk), True = attend; padded layout only
    bias: Tensor | None = None  # (B|1, Hq|1, Nq|1, Nk|1), any float dtype
    relative_bias: Tensor | None = None  # (Hq, Nq + Nk - 1), any float dtype
    alibi_slopes: Tensor | None = None  # (Hq,) or (B, Hq), any float dtype
    cu_seqlens_q: Tensor | None = None  # int32 (B + 1,): the packed layout
    cu_seqlens_k: Tensor | None = None  # int32 (B + 1,)
    seed: Tensor | None = None  # int64, one element: needed when dropout_p > 0


class AttentionOptions(NamedTuple):
    """Everything else a call says, every default filled in."""

    causal: bool
    softmax_scale: float
    window_left: int  # -1: unlimited
    window_right: int
    softcap: float  # 0: none
    dropout_p: float
    max_seqlen_q: int  # packed layout only, else 0
    max_seqlen_k: int


@dataclass(frozen=True, eq=False)
class AttentionProblem:
    """Everything about a call except the addresses and strides of its tensors. Compared by identity."""

    device: torch.device
    dtype: torch.dtype
    packed: bool
    batch: int
    num_heads: int
    num_kv_heads: int
    seqlen_q: int  # the longest sequence in the packed layout
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    total_q: int  # rows of q over the whole batch
    total_k: int

    causal: bool  # query i sees keys j <= i + Nk - Nq
    softmax_scale: float
    window_left: int  # -1: unlimited; else query i sees j >= i + Nk - Nq - window_left
    window_right: int  # -1: unlimited; else query i sees j <= i + Nk - Nq + window_right
    softcap: float  # 0: none
    dropout_p: float

    has_key_mask: bool
    bias_shape: tuple[int, int, int, int] | None
    bias_dtype: torch.dtype | None
    has_relative_bias: bool
    alibi_shape: tuple[int, ...] | None
    has_optional_tensors: bool  # anything beside q, k and v
    need_grad: bool  # whether a backward pass will follow


_described: dict[tuple, AttentionProblem] = {}


def describe(inputs: AttentionInputs, options: tuple, need_grad: bool) -> AttentionProblem:
    """The validated problem of tensors and AttentionOptions, remembered; or InvalidArgumentError."""
    q, k, v, a, b, c, d, e, f, g = inputs
    key = (
        need_grad, options,
        q.shape, q.dtype, q.device, k.shape, k.dtype, k.device, v.shape, v.dtype, v.device,
    )  # fmt: skip
    if not (a is b is c is d is e is f is g is None):
        key += tuple(None if t is None else (t.shape, t.dtype, t.device) for t in inputs[3:])
    problem = _described.get(key)
    if problem is None:
        problem = validate(inputs, AttentionOptions(*options), need_grad)
        if len(_described) >= _CACHE_SIZE:
            _described.clear()
        _described[key] = problem
    return problem


def validate(inputs: AttentionInputs, options: AttentionOptions, need_grad: bool) -> AttentionProblem:
    """`describe` without the memory: also for tensors whose sizes are symbols."""
    q, k, v = inputs[:3]
    packed = inputs.cu_seqlens_q is not None
    _check_dtypes_and_devices(inputs)
    if packed:
        batch, seqlen_q, seqlen_k = _check_packed(inputs, options.max_seqlen_q, options.max_seqlen_k)
    else:
        batch, seqlen_q, seqlen_k = _check_padded(inputs)
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    _check_heads(q, k, v, num_heads, num_kv_heads)
    _check_scores(inputs, batch, num_heads, seqlen_q, seqlen_k)
    _check_numbers(options)
    _check_dropout(options.dropout_p, inputs.seed)
    bias, alibi_slopes = inputs.bias, inputs.alibi_slopes
    return AttentionProblem(
        device=q.device,
        dtype=q.dtype,
        packed=packed,
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
        total_q=q.shape[0] if packed else batch * seqlen_q,
        total_k=k.shape[0] if packed else batch * seqlen_k,
        causal=options.causal,
        softmax_scale=options.softmax_scale,
        window_left=options.window_left,
        window_right=options.window_right,
        softcap=options.softcap,
        dropout_p=options.dropout_p,
        has_key_mask=inputs.key_mask is not None,
        bias_shape=None if bias is None else tuple(bias.shape),
        bias_dtype=None if bias is None else bias.dtype,
        has_relative_bias=inputs.relative_bias is not None,
        alibi_shape=None if alibi_slopes is None else tuple(alibi_slopes.shape),
        has_optional_tensors=any(tensor is not None for tensor in inputs[3:]),
        need_grad=need_grad,
    )


def _check_dtypes_and_devices(inputs: AttentionInputs) -> None:
    q = inputs.q
    if q.dtype not in FLOAT_DTYPES:
        raise InvalidArgumentError("q", q.dtype, _DTYPE_NAMES)
    for name in ("k", "v"):
        tensor = getattr(inputs, name)
        if tensor.dtype != q.dtype:
            raise InvalidArgumentError(name, tensor.dtype, f"{q.dtype}, the dtype of q")
    for name in ("bias", "relative_bias", "alibi_slopes"):
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            raise InvalidArgumentError(name, tensor.dtype, _DTYPE_NAMES)
    if inputs.key_mask is not None and inputs.key_mask.dtype != torch.bool:
        raise InvalidArgumentError(
            "key_mask", inputs.key_mask.dtype, "torch.bool, True where a key may be seen"
        )
    for name, tensor in zip(AttentionInputs._fields, inputs, strict=True):
        if tensor is not None and name != "seed" and tensor.device != q.device:
            raise InvalidArgumentError(name, f"on {tensor.device}", f"on {q.device}, the device of q")
    if inputs.seed is not None and inputs.seed.device.type not in ("cpu", q.device.type):
        raise InvalidArgumentError("seed", f"on {inputs.seed.device}", f"on the CPU or on {q.device}")


def _check_padded(inputs: AttentionInputs) -> tuple[int, int, int]:
    """Batch and sequence lengths of (B, H, N, D) tensors."""
    q, k, v = inputs[:3]
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise InvalidArgumentError(name, f"of shape {tuple(tensor.shape)}", "4 dimensions (B, H, N, D)")
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[2], k.shape[2]
    if k.shape[0] != batch:
        raise InvalidArgumentError("k", f"of shape {tuple(k.shape)}", f"batch size {batch}, that of q")
    if v.shape[0] != batch or v.shape[2] != seqlen_k:
        allowed = f"({batch}, {k.shape[1]}, {seqlen_k}, head_dim_v), as k has it"
        raise InvalidArgumentError("v", f"of shape {tuple(v.shape)}", allowed)
    key_mask = inputs.key_mask
    if key_mask is not None and tuple(key_mask.shape) != (batch, seqlen_k):
        raise InvalidArgumentError(
            "key_mask", f"of shape {tuple(key_mask.shape)}", f"(B, Nk) = ({batch}, {seqlen_k})"
        )
    if inputs.cu_seqlens_k is not None:
        raise InvalidArgumentError("cu_seqlens_k", "given without cu_seqlens_q", "both or neither")
    return batch, seqlen_q, seqlen_k


def _check_packed(inputs: AttentionInputs, max_seqlen_q: int, max_seqlen_k: int) -> tuple[int, int, int]:
    """Batch and longest sequences of (total, H, D) tensors. The offsets are checked where they are read."""
    q, k, v, cu_q, cu_k = inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_q, inputs.cu_seqlens_k
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise InvalidArgumentError(name, f"of shape {tuple(tensor.shape)}", "3 dimensions (total, H, D)")
    if v.shape[0] != k.shape[0]:
        raise InvalidArgumentError("v", f"of shape {tuple(v.shape)}", f"{k.shape[0]} rows, as k has")
    if inputs.key_mask is not None:
        raise InvalidArgumentError(
            "key_mask", "given", "none in the packed layout: leave masked keys out of it"
        )
    if cu_k is None:
        raise InvalidArgumentError(
            "cu_seqlens_k", "missing", "both cu_seqlens_q and cu_seqlens_k, or neither"
        )
    for name, offsets in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if offsets.dtype != torch.int32 or offsets.dim() != 1 or offsets.shape[0] < 1:
            value = f"{offsets.dtype} of shape {tuple(offsets.shape)}"
            raise InvalidArgumentError(name, value, "torch.int32 of shape (batch + 1,)")
    if cu_k.shape[0] != cu_q.shape[0]:
        raise InvalidArgumentError(
            "cu_seqlens_k", f"of shape {tuple(cu_k.shape)}", f"({cu_q.shape[0]},), as for q"
        )
    for name, longest, total in (
        ("max_seqlen_q", max_seqlen_q, q.shape[0]),
        ("max_seqlen_k", max_seqlen_k, k.shape[0]),
    ):
        if longest < 0:
            raise InvalidArgumentError(name, longest, f"the length of the longest sequence, 0..{total}")
    return cu_q.shape[0] - 1, max_seqlen_q, max_seqlen_k


def _check_heads(q: Tensor, k: Tensor, v: Tensor, num_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads != 0:
        allowed = "at least 1, and the number of query heads a multiple of it"
        raise InvalidArgumentError("k", f"{num_kv_heads} heads for {num_heads} query heads", allowed)
    if v.shape[1] != num_kv_heads:
        raise InvalidArgumentError("v", f"of shape {tuple(v.shape)}", f"{num_kv_heads} heads, as k has")
    if k.shape[-1] != q.shape[-1]:
        raise InvalidArgumentError("k", f"head_dim {k.shape[-1]}", f"{q.shape[-1]}, the head_dim of q")
    for name, tensor in (("q", q), ("v", v)):
        if not 1 <= tensor.shape[-1] <= MAX_HEAD_DIM:
            raise InvalidArgumentError(name, f"head_dim {tensor.shape[-1]}", f"1..{MAX_HEAD_DIM}")


def _check_scores(inputs: AttentionInputs, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int) -> None:
    """Shapes of what is added to the scores."""
    bias, relative_bias, slopes = inputs.bias, inputs.relative_bias, inputs.alibi_slopes
    if bias is not None:
        full = (batch, num_heads, seqlen_q, seqlen_k)
        if bias.dim() != 4 or any(
            size not in (1, whole) for size, whole in zip(bias.shape, full, strict=True)
        ):
            allowed = f"broadcastable to (B, Hq, Nq, Nk) = {full}"
            raise InvalidArgumentError("bias", f"of shape {tuple(bias.shape)}", allowed)
    if relative_bias is not None:
        allowed = (num_heads, max(seqlen_q + seqlen_k - 1, 0))
        if tuple(relative_bias.shape) != allowed:
            value = f"of shape {tuple(relative_bias.shape)}"
            raise InvalidArgumentError("relative_bias", value, f"(Hq, Nq + Nk - 1) = {allowed}")
    if slopes is not None and tuple(slopes.shape) not in ((num_heads,), (batch, num_heads)):
        allowed = f"(Hq,) = ({num_heads},) or (B, Hq) = ({batch}, {num_heads})"
        raise InvalidArgumentError("alibi_slopes", f"of shape {tuple(slopes.shape)}", allowed)


def _check_numbers(options: AttentionOptions) -> None:
    if not math.isfinite(options.softmax_scale):
        raise InvalidArgumentError("scale", options.softmax_scale, "a finite number")
    window = (options.window_left, options.window_right)
    if min(window) < -1:
        raise InvalidArgumentError("window", window, "(left, right), each >= 0 or None")
    if not (options.softcap >= 0.0 and math.isfinite(options.softcap)):
        raise InvalidArgumentError("softcap", options.softcap, "a finite number > 0, or None")


def _check_dropout(dropout_p: float, seed: Tensor | None) -> None:
    # 16 random bits decide, so a probability that rounds to 65536/65536 would leave nothing to scale up.
    if not 0.0 <= dropout_p < 1.0 or drop_threshold(dropout_p) > 65535:
        raise InvalidArgumentError("dropout_p", dropout_p, "0 <= dropout_p < 1 - 2**-17")
    if dropout_p > 0.0 and seed is None:
        raise InvalidArgumentError("seed", None, "a seed whenever dropout_p > 0")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        value = f"{seed.dtype} of shape {tuple(seed.shape)}"
        raise InvalidArgumentError("seed", value, "an int, or one torch.int64 element")


def check_offsets(name: str, offsets: Tensor, total: int, longest: int) -> list[int]:
    """The offsets as integers; they must ascend within 0..total, in steps of at most `longest`."""
    values = offsets.tolist()
    ascending = all(a <= b for a, b in itertools.pairwise(values))
    if not ascending or values[0] < 0 or values[-1] > total:
        raise InvalidArgumentError(name, values, f"ascending offsets within 0..{total}")
    longest_found = max((b - a for a, b in itertools.pairwise(values)), default=0)
    if longest_found > longest:
        raise InvalidArgumentError(
            name.replace("cu_seqlens", "max_seqlen"), longest, f"at least {longest_found}"
        )
    return values
