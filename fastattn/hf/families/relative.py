"""T5's position bias by distance: (Hq, Nq + Nk - 1) numbers where transformers makes (1, Hq, Nq, Nk).

A bucket depends on the distance between key and query alone, so the bias of every distance says all there is.
Two hooks hand it to attention as the position_bias that transformers passes on from the first layer to the
others; transformers' own code, which computes a bias only where none was passed, makes none. The gradient
reaches the table of buckets through the embedding that was asked for each distance once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

from ...errors import UnsupportedModelError
from . import forward_parameters

_TRIED = (5, 300, 7)  # queries, keys, positions before: exact, logarithmic and last buckets, on both sides


def by_distance(
    attention: nn.Module, num_queries: int, num_keys: int, before: int | Tensor, device: torch.device
) -> Tensor:
    """(Hq, num_queries + num_keys - 1): entry [h, j - i + num_queries - 1] is the bias of query i and key j.

    before: positions ahead of query 0, as a cache holds them.
    """
    distance = torch.arange(1 - num_queries, num_keys, device=device) - before
    buckets = attention._relative_position_bucket(
        distance,
        bidirectional=not attention.is_decoder,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return attention.relative_attention_bias(buckets).t().contiguous()


def is_by_distance(position_bias: Tensor | None) -> bool:
    """Whether a position_bias comes from here: transformers' own has four dimensions."""
    return position_bias is not None and position_bias.dim() == 2


def of_pairs(relative_bias: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """(1, Hq, Nq, Nk), for those who want to see the weights."""
    keys = torch.arange(num_keys, device=relative_bias.device)
    queries = torch.arange(num_queries, device=relative_bias.device)
    return relative_bias[:, keys - queries[:, None] + num_queries - 1][None]


@dataclass(frozen=True)
class BiasOfSelfAttention:
    """Before the self-attention that owns the table."""

    def __call__(self, attention: nn.Module, args: tuple, kwargs: dict):
        if kwargs.get("position_bias") is not None or attention.config._attn_implementation != "fastattn":
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        past = kwargs.get("past_key_values")
        if kwargs.get("cu_seq_lens_q") is not None:
            num_queries, num_keys, before = kwargs["max_length_q"], kwargs["max_length_k"], 0
        elif past is not None:
            num_queries = hidden.shape[1]
            num_keys, _ = past.get_mask_sizes(num_queries, attention.layer_idx)
            before = past.get_seq_length(attention.layer_idx)
        else:
            num_queries, num_keys, before = hidden.shape[1], hidden.shape[1], 0
        bias = by_distance(attention, num_queries, num_keys, before, hidden.device)
        return args, {**kwargs, "position_bias": bias}


@dataclass(frozen=True)
class NoBiasOfCrossAttention:
    """Before a cross-attention, which has no bias: one of no distances, so that no zeros are made."""

    def __call__(self, attention: nn.Module, args: tuple, kwargs: dict):
        if kwargs.get("position_bias") is not None or attention.config._attn_implementation != "fastattn":
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        return args, {**kwargs, "position_bias": hidden.new_empty((attention.n_heads, 0))}


@torch.no_grad()
def check(attention: nn.Module) -> None:
    """Raise UnsupportedModelError unless this self-attention's own bias is what `by_distance` says."""
    names = forward_parameters(attention)
    expected = ("position_bias", "past_key_values")
    missing = [name for name in expected if name not in names]
    missing += [name for name in ("relative_attention_bias", "compute_bias") if not hasattr(attention, name)]
    if missing:
        raise _mismatch(attention, f"it has no {missing[0]!r}")
    table = attention.relative_attention_bias.weight
    if table.device.type == "meta":
        return
    num_queries, num_keys, before = _TRIED
    try:
        theirs = attention.compute_bias(num_queries, num_keys, past_seen_tokens=before)
        ours = of_pairs(by_distance(attention, *_TRIED, table.device), num_queries, num_keys)
    except (TypeError, AttributeError) as error:
        raise _mismatch(attention, str(error)) from error
    if theirs.shape != ours.shape or not torch.equal(theirs, ours):
        raise _mismatch(attention, "its compute_bias is not the table's entry for each distance")


def _mismatch(attention: nn.Module, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(attention).__name__} is not built as fastattn knows it: {what} "
        f"(transformers {transformers.__version__})"
    )
