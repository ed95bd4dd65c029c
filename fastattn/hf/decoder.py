"""A decoder without padding: its tokens are packed before the embeddings and padded behind the last norm.

So are those of any model whose embeddings and layers are in one forward. Positions are those that the padded
batch has, so outputs at real tokens are exactly the same. Inference with a cache keeps its padding: what is
cached must lie as the next call expects it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .call import KEYWORD, Call, Options, argument, begin, pad_output, replace_arguments
from .families import DecoderFamily, FlatFamily, forward_parameters
from .packing import Layout
from .prefix import behind_prefix, shared_prefix
from .prompt_attention import KEYWORD as PROMPT
from .prompt_cache import PromptCache

PER_TOKEN = ("input_ids", "inputs_embeds", "token_type_ids")


@dataclass(frozen=True)
class EnterDecoder:
    """Before the bare model: padding goes."""

    options: Options
    family: FlatFamily

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict):
        cache, prefix = argument(model, "past_key_values", args, kwargs), None
        if cache is not None and not _returns_cache(model, args, kwargs):
            prefix = shared_prefix(model, cache, self.family.num_layers(model))
        call = begin(model, args, kwargs, self.options, self.family, self.family.bare_reads, prefix)
        kwargs = {**kwargs, KEYWORD: call}
        if isinstance(cache, PromptCache):
            return args, {**kwargs, PROMPT: cache.prompt_pass()}
        tokens = {name: argument(model, name, args, kwargs) for name in PER_TOKEN}
        first = next((value for value in tokens.values() if value is not None), None)
        if call.prefix is not None and first is not None:
            args, kwargs = self._instead_of_cache(model, args, kwargs, call, first)
        mask = argument(model, "attention_mask", args, kwargs)
        if not isinstance(mask, Tensor) or first is None or uses_cache(model, args, kwargs):
            return args, kwargs
        layout = call.layout_for(mask, first.shape[:2])
        if layout is None:
            return args, kwargs
        new = {name: pack_tokens(layout, value) for name, value in tokens.items() if value is not None}
        given = argument(model, "position_ids", args, kwargs)
        if given is None and self._counts_tokens:
            given = mask.cumsum(1) - 1
        new["position_ids"] = positions(layout, given, first.device)
        # Not None: from position_ids alone transformers would build a mask of pairs of tokens.
        new["attention_mask"] = torch.ones(1, len(layout.rows), dtype=torch.bool, device=first.device)
        if _has_cache(model):
            new["use_cache"] = False
        return replace_arguments(model, args, kwargs, {**new, **layout.keywords})

    @property
    def _counts_tokens(self) -> bool:
        return isinstance(self.family, DecoderFamily) and self.family.counts_tokens

    def _instead_of_cache(
        self, model: nn.Module, args: tuple, kwargs: dict, call: Call, tokens: Tensor
    ) -> tuple[tuple, dict]:
        """The arguments with the call's prefix as a shared prompt, positions counted on behind it."""
        batch, seqlen = tokens.shape[:2]
        length = call.prefix.keys[0].shape[2]
        mask = argument(model, "attention_mask", args, kwargs)
        own = behind_prefix(mask, call.prefix, seqlen)
        if own is None and mask is not None:
            call.prefix = None
            return args, kwargs
        given = argument(model, "position_ids", args, kwargs)
        if given is None:
            given = torch.arange(length, length + seqlen, device=tokens.device).expand(batch, -1)
            if self._counts_tokens and mask is not None:
                given = (mask.cumsum(1) - 1)[:, length:]
        new = {"position_ids": given, "past_key_values": None, "use_cache": False, PROMPT: call.prefix}
        # Not None: from position_ids alone transformers would build a mask of pairs of tokens.
        ones = torch.ones(batch, seqlen, dtype=torch.bool, device=tokens.device)
        return replace_arguments(model, args, kwargs, {**new, "attention_mask": ones if own is None else own})


@dataclass(frozen=True)
class LeaveDecoder:
    """Behind it: zeros where padding was."""

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict, output):
        call, prompt = kwargs[KEYWORD], kwargs.get(PROMPT)
        if prompt is not None:
            prompt.check_attended(model, call.layers)
        if call.layout is None:
            return None
        call.check_attended(model)
        return pad_output(call.layout, output)


def _has_cache(model: nn.Module) -> bool:
    return "use_cache" in forward_parameters(model)


def uses_cache(model: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether this pass reads or fills one. In training nobody reads what use_cache, the default, returns."""
    if not _has_cache(model):
        return False
    if argument(model, "past_key_values", args, kwargs) is not None:
        return True
    return _returns_cache(model, args, kwargs)


def _returns_cache(model: nn.Module, args: tuple, kwargs: dict) -> bool:
    use_cache = argument(model, "use_cache", args, kwargs)
    use_cache = model.config.use_cache if use_cache is None else use_cache
    return bool(use_cache) and not model.training


def pack_tokens(layout: Layout, value: Tensor) -> Tensor:
    """(B, N) or (B, N, C) -> (1, T) or (1, T, C)"""
    return layout.pack(value) if value.dim() == 3 else value.reshape(-1)[layout.rows][None]


def positions(layout: Layout, given: Tensor | None, device: torch.device) -> Tensor:
    """(1, T): each token's position in its padded sample, or what the caller said it is."""
    if given is None:
        given = torch.arange(layout.seqlen, device=device)[None]
    return pack_tokens(layout, given.expand(layout.batch, layout.seqlen))
