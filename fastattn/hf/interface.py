"""The attention function that transformers calls for attn_implementation="fastattn".

Masks reach it in the forms that masks.py returns: None, a (B, Nk) bool mask of the keys, or, where only that
says it, a (B, 1, Nq, Nk) mask. Whatever it cannot compute exactly it refuses with an UnsupportedError.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..attention import attention, varlen_attention
from ..errors import InvalidArgumentError, UnsupportedError
from ..frozen import set_packing
from ..log import log_once
from .call import Call
from .families import relative
from .first_token import FirstRows
from .masks import fastattn_mask
from .prompt_attention import PromptPass

NAME = "fastattn"

# Keyword arguments that transformers threads through its models and that say nothing about the attention
# itself.
_WITHOUT_EFFECT = frozenset(
    {
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "position_embeddings",
        "cache_position",
        "use_cache",
        "return_dict",
        "past_key_values",
        "logits_to_keep",
        "deterministic",
        "debug_io",
        "debug_io_dir",
        "seq_idx",
    }
)


def register() -> None:
    """Make "fastattn" a name transformers knows, for attention and for masks alike.

    Both are needed: a name without a mask function makes transformers hand over no mask at all.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, fastattn_attention)
    AttentionMaskInterface.register(NAME, fastattn_mask)
    try:
        from . import own_attention
    except (ImportError, AttributeError):
        return  # a transformers with other classes; patch says so where it meets such a model
    own_attention.register()


def fastattn_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    output_attentions: bool = False,
    fastattn_call: Call | None = None,
    fastattn_first: FirstRows | None = None,
    fastattn_prompt: PromptPass | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, in the form of transformers' AttentionInterface.

    query is (B, Hq, Nq, D), key and value (B, Hkv, Nk, D) with Hkv dividing Hq: nothing is expanded. With
    cu_seq_lens_q (int, B' + 1 offsets) the batch is one packed row of B' sequences and the mask is theirs by
    construction. position_bias is added to the scores: (B|1, Hq, Nq, Nk), or (Hq, Nq + Nk - 1) by distance
    (families/relative.py). Returns the output as (B, Nq, Hq, Dv) and None, or the (B, Hq, Nq, Nk) weights
    where output_attentions asks for them, which the model's plain formula then computes.
    """
    _refuse_unknown(module, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = None
    if sliding_window is not None:
        # transformers counts the query's own position, and looks as far ahead where attention is not causal.
        window = (sliding_window - 1, 0 if causal else sliding_window - 1)
    options = {"scale": scaling, "softcap": softcap, "dropout_p": dropout}
    options["backend"] = "auto" if fastattn_call is None else fastattn_call.backend
    output_attentions = output_attentions or (fastattn_call is not None and fastattn_call.output_attentions)
    relative_bias = None
    if relative.is_by_distance(position_bias):
        relative_bias, position_bias = position_bias if position_bias.shape[1] else None, None
    elif position_bias is not None:
        log_once(
            f"{type(module).__name__} made a position bias for every pair of tokens, O(Nq Nk) memory; "
            "after fastattn.hf.patch(model) it makes one for every distance"
        )

    attend, attend_packed = attention, varlen_attention
    if fastattn_prompt is not None:
        if output_attentions:
            raise UnsupportedError("output_attentions=True with a shared prompt")
        if relative_bias is not None:
            raise UnsupportedError("a position bias with a shared prompt")
        attend, attend_packed = fastattn_prompt.of_layer(module)

    # What dropout behind this attention has to know: see frozen/dropout.py.
    set_packing(cu_seq_lens_q, query.shape[2])
    if cu_seq_lens_q is not None:
        if fastattn_call is not None:
            fastattn_call.attended += 1
        if output_attentions or position_bias is not None:
            what = "output_attentions=True" if output_attentions else "position_bias"
            raise UnsupportedError(f"{what} with packed sequences (cu_seq_lens_q)")
        lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        options.update(causal=causal, window=window)
        if relative_bias is not None:
            options["relative_bias"] = relative_bias
        return _packed(attend_packed, query, key, value, lengths, fastattn_first, **options), None

    key_mask, bias = None, position_bias
    if attention_mask is not None:
        key_mask = _as_key_mask(attention_mask)
        if key_mask is None:
            # A mask of pairs says all there is to say: causality and window are in it already.
            bias = _added(bias, _as_bias(attention_mask, query.dtype))
            causal, window = False, None
            key, value = key[:, :, : bias.shape[-1]], value[:, :, : bias.shape[-1]]
        elif key_mask.shape[1] != key.shape[2]:
            # Keys beyond the mask are the unwritten end of a static cache.
            key, value = key[:, :, : key_mask.shape[1]], value[:, :, : key_mask.shape[1]]
    if relative_bias is not None:
        # Keys that were cut off are the last, so are their distances.
        options["relative_bias"] = relative_bias[:, : query.shape[2] + key.shape[2] - 1]
    if output_attentions:
        log_once(
            "output_attentions=True: attention runs as plain PyTorch, a fused kernel has no weights to return"
        )
        options.pop("backend")
        if relative_bias is not None:
            pairs = relative.of_pairs(options.pop("relative_bias"), query.shape[2], key.shape[2])
            bias = pairs if bias is None else _added(bias, pairs)
        return attention_with_weights(
            query, key, value, key_mask, bias, causal=causal, window=window, **options
        )
    options.update(causal=causal, window=window, key_mask=key_mask, bias=bias)
    plain = bias is None and relative_bias is None and not causal and window is None
    if fastattn_first is not None and plain:
        out = attend(query[:, :, :1], key, value, **options).transpose(1, 2)
        return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, query.shape[2] - 1)), None
    return attend(query, key, value, **options).transpose(1, 2), None


def _packed(
    attend: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple,
    first: FirstRows | None,
    **options,
) -> Tensor:
    """`attend`, called as varlen_attention is, for one packed row; lengths are transformers' cu_seq_lens_q,
    _k, max_length_q, _k."""
    if query.shape[0] != 1:
        raise InvalidArgumentError(
            "cu_seq_lens_q", f"given for a batch of {query.shape[0]}", "one packed row"
        )
    cu_q, cu_k, max_q, max_k = lengths
    cu_q = cu_q.to(torch.int32)
    cu_k = cu_q if cu_k is None else cu_k.to(torch.int32)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    # max_length may be a tensor; with neither of the two given, the longest sequence is read from the
    # offsets.
    max_q = None if max_q is None else int(max_q)
    max_k = max_q if max_k is None else int(max_k)
    if first is not None and not options["causal"] and options["window"] is None:
        # The other rows of the last layer are read by nobody: see first_token.py.
        queries = q.index_select(0, first.rows)
        offsets = {"cu_seqlens_q": first.cu_seqlens, "cu_seqlens_k": cu_k}
        out = attend(queries, k, v, **offsets, max_seqlen_q=1, max_seqlen_k=max_k, **options)
        out = out.new_zeros(q.shape[0], *out.shape[1:]).index_copy(0, first.rows, out)
    else:
        out = attend(q, k, v, cu_q, cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k, **options)
    return out.unsqueeze(0)


def _refuse_unknown(module: nn.Module, kwargs: dict) -> None:
    """An argument that could change the result and is not understood must not be dropped."""
    for name, value in kwargs.items():
        if value is None or value is False or name in _WITHOUT_EFFECT:
            continue
        raise UnsupportedError(
            f"{type(module).__name__} passes {name!r} to its attention, which fastattn does not know"
        )


def _as_key_mask(mask: Tensor) -> Tensor | None:
    """(B, Nk) bool, True = attend, if the mask treats all queries and heads alike; None otherwise."""
    if mask.dtype != torch.bool:
        return None
    if mask.dim() == 2:
        return mask
    if mask.dim() != 4:
        raise InvalidArgumentError(
            "attention_mask", f"of shape {tuple(mask.shape)}", "(B, Nk) or (B, 1, Nq, Nk)"
        )
    for axis in (1, 2):
        if mask.shape[axis] != 1 and mask.stride(axis) != 0:
            return None
    return mask[:, 0, 0]


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to the scores: 0 or -inf for bool, itself for float (its lowest number is -inf)."""
    if mask.dim() != 4:
        raise InvalidArgumentError("attention_mask", f"of shape {tuple(mask.shape)}", "(B, 1, Nq, Nk)")
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, float("-inf"))
    if not mask.is_floating_point():
        raise InvalidArgumentError(
            "attention_mask", mask.dtype, "bool (True = attend) or float (added to the scores)"
        )
    return mask.masked_fill(mask <= torch.finfo(mask.dtype).min, float("-inf"))


def _added(bias: Tensor | None, other: Tensor) -> Tensor:
    return other if bias is None else bias + other


def attention_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    *,
    causal: bool,
    window: tuple[int, int] | None,
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The textbook formula, for callers who want to see the weights: (B, Nq, Hq, Dv) and (B, Hq, Nq, Nk)."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    # The lowest finite number, as transformers does: a query with no key at all gets equal weights, not NaN.
    lowest = torch.finfo(scores.dtype).min
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], lowest)
    if causal or window is not None:
        nq, nk = scores.shape[-2:]
        distance = (
            torch.arange(nk, device=scores.device) - torch.arange(nk - nq, nk, device=scores.device)[:, None]
        )
        hidden = (distance > 0) if causal else torch.zeros_like(distance, dtype=torch.bool)
        if window is not None:
            hidden = hidden | (distance < -window[0]) | (distance > window[1])
        scores = scores.masked_fill(hidden, lowest)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, p=dropout_p)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights
