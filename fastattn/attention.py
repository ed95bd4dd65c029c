"""The public functions: what they mean, then arguments -> problem -> op."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from . import dispatch, ops, reference
from .errors import InvalidArgumentError
from .problem import AttentionInputs, AttentionOptions, describe

Window = tuple[int | None, int | None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + biases) v without ever storing the scores, forward and backward.

    The scores are s = softcap * tanh(scale * q k^T / softcap) + bias + relative_bias + alibi, -inf where a
    key is not visible. A query that sees no key gives a row of zeros. Online softmax after Milakov and
    Gimelshein (arXiv:1805.02867), tiled as by Dao (arXiv:2307.08691); softmax and sums are in float32 for
    every dtype. Products of float32 matrices are exact to float32 unless torch.set_float32_matmul_precision
    allows less: bfloat16 on CPUs under "medium", sums of two bfloat16 numbers on AMX under "high", TF32
    in Triton under both.

    Args:
        q: (B, Hq, Nq, D), float32, bfloat16 or float16 (float64 with backend="reference"). D <= 256. Any
            strides; a last dimension that is not contiguous is copied first.
        k: (B, Hkv, Nk, D), q's dtype. Hq must be a multiple of Hkv: query head h reads kv head h // (Hq //
            Hkv).
        v: (B, Hkv, Nk, Dv), q's dtype. Dv may differ from D.
        causal: query i sees keys j <= i + Nk - Nq (the last query sees the last key).
        scale: factor of q k^T; D ** -0.5 when None.
        key_mask: (B, Nk) bool, True = may be seen. What lies under False is never read into a result, NaN
            included.
        bias: broadcastable to (B, Hq, Nq, Nk), any float dtype, added after scaling and softcap.
            Differentiable; its gradient costs the memory of the bias as it was passed, in float32.
        relative_bias: (Hq, Nq + Nk - 1), any float dtype; entry [h, j - i + Nq - 1] is added. Differentiable.
        alibi_slopes: (Hq,) or (B, Hq); -slope * |i + Nk - Nq - j| is added (Press et al., arXiv:2108.12409).
        window: (left, right): query i sees keys i + Nk - Nq - left <= j <= i + Nk - Nq + right; None =
            unlimited.
        softcap: softcap * tanh(s / softcap) bounds the scaled scores before biases are added.
        dropout_p: probability of dropping an attention weight, 0 <= p < 1.
        seed: int or int64 tensor of one element; which weights are dropped is a function of (seed, b, h, i,
            j) alone, the same on every backend. None draws one from torch's default generator of q's device.
        return_lse: also return the log-sum-exp of each row's scores.
        backend: "auto", "cuda", "triton", "cpu", or "reference" (plain PyTorch, O(Nq Nk) memory, never chosen
            by "auto").

    Returns:
        out (B, Hq, Nq, Dv) in q's dtype, in q's order of memory; with return_lse, (out, lse) with lse (B, Hq,
        Nq) float32, natural logarithm, -inf for a row that sees no key. Both differentiable, once.

    Raises:
        InvalidArgumentError: a malformed argument; names it, its value, and what is allowed.
        UnsupportedError: no backend, or not the one named, computes this; with each one's reason.
        BackendUnavailableError: the backend named is not on this machine.
    """
    return _attend(
        AttentionInputs(q, k, v, key_mask, bias, relative_bias, alibi_slopes),
        0, 0, causal, scale, window, softcap, dropout_p, seed, return_lse, backend,
    )  # fmt: skip


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of a batch of sequences packed one after another, with no padding between them.

    Everything that `attention` documents holds per sequence: i, j, Nq and Nk count within it. So dropout
    drops the same weights as in the padded layout.

    Args:
        q: (total_q, Hq, D). Rows cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1 are sequence b.
        k: (total_k, Hkv, D).
        v: (total_k, Hkv, Dv).
        cu_seqlens_q: (B + 1,) int32 on q's device, ascending offsets; sequences may be empty.
        cu_seqlens_k: the same for k and v; cu_seqlens_q when None.
        max_seqlen_q: the length of the longest sequence, or more. When None it is computed, which waits for
            the device and breaks torch.compile's graph: pass it where that matters.
        max_seqlen_k: the same for the keys.
        bias: broadcastable to (B, Hq, max_seqlen_q, max_seqlen_k).
        relative_bias: (Hq, max_seqlen_q + max_seqlen_k - 1); entry [h, j - i + max_seqlen_q - 1] is added.
        alibi_slopes: (Hq,) or (B, Hq).
        causal, scale, window, softcap, dropout_p, seed, return_lse, backend: as in `attention`.

    Returns:
        out (total_q, Hq, Dv); with return_lse, (out, lse) with lse (Hq, total_q). Rows that belong to no
        sequence are zero, their lse -inf.

    Raises:
        As `attention`. On a GPU the offsets themselves are not checked, as that would wait for the device:
        there a sequence longer than max_seqlen_q or max_seqlen_k gives NaN.
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
        if max_seqlen_k is None:
            max_seqlen_k = max_seqlen_q
    _check_tensor("cu_seqlens_q", cu_seqlens_q)
    _check_tensor("cu_seqlens_k", cu_seqlens_k)
    if max_seqlen_q is None:
        max_seqlen_q = _longest(cu_seqlens_q)
    if max_seqlen_k is None:
        max_seqlen_k = max_seqlen_q if cu_seqlens_k is cu_seqlens_q else _longest(cu_seqlens_k)
    return _attend(
        AttentionInputs(q, k, v, None, bias, relative_bias, alibi_slopes, cu_seqlens_q, cu_seqlens_k),
        max_seqlen_q, max_seqlen_k, causal, scale, window, softcap, dropout_p, seed, return_lse, backend,
    )  # fmt: skip


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` over one prefix shared by the whole batch, followed by each sequence's own keys.

    The same as attending to the prefix and k concatenated, but the prefix is read once for all queries of the
    batch instead of once per sequence, and its gradient is summed over the batch where it is computed. Every
    query sees the whole prefix; causal, key_mask and window speak of k alone. The two parts are merged by
    their log-sum-exps (as in Juravsky et al., "Hydragen", arXiv:2402.05099).

    Args:
        q: (B, Hq, Nq, D).
        k: (B, Hkv, Nk, D).
        v: (B, Hkv, Nk, Dv).
        prefix_k: (1, Hkv, P, D).
        prefix_v: (1, Hkv, P, Dv).
        dropout_p, seed: as in `attention`, except that the prefix draws its mask from seed + 1 and numbers
            the queries of the whole batch b * Nq + i.
        causal, scale, key_mask, window, softcap, return_lse, backend: as in `attention`.

    Returns:
        out (B, Hq, Nq, Dv); with return_lse, (out, lse) with lse (B, Hq, Nq) float32.

    Raises:
        As `attention`.
    """
    for name, tensor in (("q", q), ("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        _check_tensor(name, tensor)
        if tensor.dim() != 4:
            raise InvalidArgumentError(name, f"of shape {tuple(tensor.shape)}", "4 dimensions (B, H, N, D)")
    for name, tensor in (("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if tensor.shape[0] != 1:
            raise InvalidArgumentError(
                name, f"of shape {tuple(tensor.shape)}", "batch size 1: the prefix is shared"
            )
    batch, num_heads, seqlen_q, _ = q.shape
    seed = _seed_tensor(seed, q, dropout_p)
    common = {"scale": scale, "softcap": softcap, "dropout_p": dropout_p, "backend": backend}
    common["return_lse"] = True
    own_out, own_lse = attention(
        q, k, v, causal=causal, key_mask=key_mask, window=window, seed=seed, **common
    )
    folded = q.transpose(0, 1).reshape(1, num_heads, batch * seqlen_q, q.shape[-1])
    prefix_seed = None if seed is None else seed + 1
    prefix_out, prefix_lse = attention(folded, prefix_k, prefix_v, seed=prefix_seed, **common)
    prefix_out = prefix_out.reshape(num_heads, batch, seqlen_q, -1).transpose(0, 1)
    prefix_lse = prefix_lse.reshape(num_heads, batch, seqlen_q).transpose(0, 1)
    out, lse = merge(own_out, own_lse, prefix_out, prefix_lse)
    return (out, lse) if return_lse else out


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from the attention over each: out (..., Dv), lse (...)."""
    # Finite stand-ins keep exp and its gradient free of inf - inf where a side saw no key.
    empty = (lse_a == -math.inf) & (lse_b == -math.inf)
    lse = torch.logaddexp(lse_a.masked_fill(empty, 0.0), lse_b.masked_fill(empty, 0.0))
    weight_a, weight_b = (torch.exp(side - lse)[..., None] for side in (lse_a, lse_b))
    merged = weight_a * out_a.to(lse.dtype) + weight_b * out_b.to(lse.dtype)
    return merged.to(out_a.dtype), lse.masked_fill(empty, -math.inf)


def _attend(
    inputs, max_seqlen_q, max_seqlen_k, causal, scale, window, softcap, dropout_p, seed, return_lse, backend,
):  # fmt: skip
    inputs, options = normalise(
        inputs, max_seqlen_q, max_seqlen_k, causal, scale, window, softcap, dropout_p, seed, backend
    )
    if backend == "reference":
        out, lse = _reference(inputs, options)
    else:
        out, lse = ops.attend(inputs, options, backend, return_lse)
    return (out, lse) if return_lse else out


def normalise(
    inputs, max_seqlen_q, max_seqlen_k, causal, scale, window, softcap, dropout_p, seed, backend,
) -> tuple[AttentionInputs, AttentionOptions]:  # fmt: skip
    """The arguments of a public function as the op takes them, types checked; `validate` checks the rest."""
    q = inputs.q
    if not (isinstance(q, Tensor) and isinstance(inputs.k, Tensor) and isinstance(inputs.v, Tensor)):
        for name in ("q", "k", "v"):
            _check_tensor(name, getattr(inputs, name))
    if inputs[3:] != _NO_OPTIONAL_TENSORS:
        inputs = _check_optional(inputs)
    if dropout_p:
        inputs = inputs._replace(seed=_seed_tensor(seed, q, dropout_p))
    head_dim = q.shape[-1] if q.dim() else 1
    settings = (head_dim, causal, scale, window, softcap, dropout_p, max_seqlen_q, max_seqlen_k, backend)
    if torch.compiler.is_compiling():
        return inputs, _options.__wrapped__(*settings)
    try:
        return inputs, _options(*settings)
    except TypeError:  # one can't be hashed: a list for the window, or a mistake
        return inputs, _options.__wrapped__(*settings)


def _reference(inputs: AttentionInputs, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    device_type = inputs.q.device.type
    if torch.is_autocast_enabled(device_type):
        inputs = AttentionInputs(*ops.cast_for_autocast(device_type, inputs[:3]), *inputs[3:])
    with torch.autocast(device_type, enabled=False):
        return reference.attention(describe(inputs, options, False), inputs)


_NO_OPTIONAL_TENSORS = (None,) * (len(AttentionInputs._fields) - 3)


def _check_optional(inputs: AttentionInputs) -> AttentionInputs:
    """Everything beside q, k and v; bias with all of its four dimensions."""
    for name, tensor in zip(inputs._fields, inputs, strict=True):
        if tensor is not None:
            _check_tensor(name, tensor)
    if inputs.alibi_slopes is not None:
        ops.check_alibi_slopes(inputs.alibi_slopes)
    if inputs.bias is not None and inputs.bias.dim() < 4:
        missing = 4 - inputs.bias.dim()
        inputs = inputs._replace(bias=inputs.bias[(None,) * missing])
    return inputs


@functools.lru_cache(maxsize=1024, typed=True)
def _options(head_dim, causal, scale, window, softcap, dropout_p, max_seqlen_q, max_seqlen_k, backend):
    """Every default filled in."""
    dispatch.check_name(backend)
    left, right = _window(window)
    return AttentionOptions(
        causal=bool(causal),
        softmax_scale=head_dim**-0.5 if scale is None else _number("scale", scale),
        window_left=left,
        window_right=right,
        softcap=0.0 if softcap is None else _number("softcap", softcap),
        dropout_p=_number("dropout_p", dropout_p),
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )


def _check_tensor(name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise InvalidArgumentError(name, f"a {type(value).__name__}", "a torch.Tensor")


def _number(name: str, value) -> float:
    if isinstance(value, (float, int)) and not isinstance(value, bool):
        return float(value)
    raise InvalidArgumentError(name, f"{value!r} ({type(value).__name__})", "a number")


def _window(window: Window | None) -> tuple[int, int]:
    """(left, right) with -1 for unlimited."""
    if window is None:
        return -1, -1
    allowed = "(left, right), each an int >= 0 or None"
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise InvalidArgumentError("window", repr(window), allowed)
    for side in window:
        if side is not None and (not isinstance(side, int) or isinstance(side, bool) or side < 0):
            raise InvalidArgumentError("window", repr(window), allowed)
    left, right = window
    return -1 if left is None else left, -1 if right is None else right


def _seed_tensor(seed: int | Tensor | None, q: Tensor, dropout_p: float) -> Tensor | None:
    """The seed as a tensor, drawn from torch's default generator when there is none. Never read back."""
    if not dropout_p:
        return None
    if seed is None:
        return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=q.device)
    if isinstance(seed, Tensor):
        return seed
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**64:
        raise InvalidArgumentError("seed", repr(seed), "an int of 64 bits, or one torch.int64 element")
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64)


def _longest(offsets: Tensor) -> int:
    return int(offsets.diff().max()) if offsets.numel() > 1 else 0
