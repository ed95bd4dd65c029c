"""Prefix tuning: one trained prefix of keys and values, which peft repeats for every sample of a batch.

Its past_key_values hold B equal rows. As a shared prompt one row is enough: it is read once for the batch,
its gradient is computed for it alone (the first layer's own keys and values have none), and the sequences
themselves run without padding, which a cache would forbid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .prompt_attention import PromptPass


def shared_prefix(model: nn.Module, cache: Cache | None, layers: int) -> PromptPass | None:
    """The prompt that a cache of `layers` layers is, if every sample has the same; looks at its values.

    None in a graph that torch.compile traces: there are no values to look at, and the cache is read as it is.
    """
    if torch.compiler.is_compiling() or type(cache) is not DynamicCache or len(cache.layers) != layers:
        return None
    if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        return None  # transformers itself drops a cache there
    pairs = [(layer.keys, layer.values) for layer in cache.layers if type(layer) is DynamicLayer]
    if len(pairs) != layers or not all(_rows_are_equal(tensor) for pair in pairs for tensor in pair):
        return None
    return PromptPass([keys[:1] for keys, _ in pairs], [values[:1] for _, values in pairs])


def _rows_are_equal(tensor: Tensor | None) -> bool:
    if tensor is None or tensor.dim() != 4 or tensor.numel() == 0:
        return False
    return tensor.shape[0] == 1 or tensor.stride(0) == 0 or torch.equal(tensor[1:], tensor[:-1])


def behind_prefix(mask: Tensor | None, prompt: PromptPass, seqlen: int) -> Tensor | None:
    """The sequences' own part of a (B, P + N) mask whose first P columns, the prefix's, hide nothing."""
    if mask is None:
        return None
    length = prompt.keys[0].shape[2]
    fits = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == length + seqlen
    return mask[:, length:] if fits and bool(mask[:, :length].all()) else None
