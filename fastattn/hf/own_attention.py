"""Attention for the models that do not ask transformers' AttentionInterface for one: GPT Neo and GPT-J.

Their attention modules get a class whose `_attn` is fastattn_attention; all else of the module stays theirs.
No keyword argument reaches it, so what other models hand down as such (the packed sequences, the call, a
shared prompt) rides on the attention mask, which comes through unchanged if it has four dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.gpt_neo import modeling_gpt_neo
from transformers.models.gptj import modeling_gptj

from .call import KEYWORD, Call, EnterHead, argument, replace_arguments
from .decoder import EnterDecoder
from .families import find_family
from .families.own_attention import OwnAttentionFamily, replace, replaced
from .interface import NAME, fastattn_attention
from .prompt_attention import KEYWORD as PROMPT
from .prompt_cache import PromptCache

_RIDES = "fastattn_rides"  # of a mask
_HANDED_DOWN = (KEYWORD, PROMPT, "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


class _OwnAttention:
    """In front of transformers' class; `family` knows its formula."""

    family: OwnAttentionFamily

    def forward(self, hidden_states: Tensor, *, attention_mask: Tensor | None = None, **kwargs):
        cache = kwargs.get("layer_past")
        past = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        past = past.clone() if isinstance(past, Tensor) else past  # a static cache counts in place
        arguments = (attention_mask, past, bool(kwargs.get("output_attentions")))
        return super().forward(hidden_states, attention_mask=arguments, **kwargs)

    def _attn(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: tuple):
        """(B, H, Nq, D), and the weights if asked for. They ask for fp32, which is what kernels sum in."""
        mask, past, output_attentions = attention_mask
        window = self.family.window(self)
        rides = dict(getattr(mask, _RIDES, {}))
        of_pairs = mask is not None and mask.dim() == 4 and rides.keys() <= {KEYWORD}
        if of_pairs and window is not None:
            mask, window = _within(mask, window, past, query.shape[2]), None
        if (by_patch := replaced(self)) is not None:
            rides.setdefault(KEYWORD, Call(by_patch.backend, False))
        out, weights = fastattn_attention(
            self, query, key, value, mask,
            dropout=self.attn_dropout.p if self.training else 0.0,
            scaling=self.family.scale(self),
            sliding_window=window,
            output_attentions=output_attentions,
            **rides,
        )  # fmt: skip
        return out.transpose(1, 2), weights


class GPTNeoAttention(_OwnAttention, modeling_gpt_neo.GPTNeoSelfAttention):
    family = find_family("gpt_neo")

    @property
    def layer_idx(self) -> int:
        return self.layer_id


class GPTJAttention(_OwnAttention, modeling_gptj.GPTJAttention):
    family = find_family("gptj")


_CLASSES = {cls.family.model_type: cls for cls in (GPTNeoAttention, GPTJAttention)}


def register() -> None:
    """Make "fastattn" a name for attn_implementation that both models know."""
    modeling_gpt_neo.GPT_NEO_ATTENTION_CLASSES[NAME] = GPTNeoAttention
    modeling_gptj.GPTJ_ATTENTION_CLASSES[NAME] = GPTJAttention


def replace_attentions(model: nn.Module, family: OwnAttentionFamily, backend: str) -> None:
    """Every attention of this bare model is fastattn's from now on, until `restore_attentions`."""
    for attention in family.attention_modules(model):
        replace(attention, _CLASSES[family.model_type], backend)


def _within(mask: Tensor, window: int, past: int | Tensor, num_queries: int) -> Tensor:
    """A (B, 1, 1|Nq, Nk) mask of pairs with the window in it; `past` keys lie before the first query.

    transformers counts back from a static cache's end instead, written or not.
    """
    queries = past + torch.arange(num_queries, device=mask.device)[:, None]
    keys = torch.arange(mask.shape[3], device=mask.device)
    hidden = (keys > queries) | (keys <= queries - window)
    return mask.masked_fill(hidden, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)


def _handed_down(kwargs: dict) -> dict:
    return {name: kwargs[name] for name in _HANDED_DOWN if kwargs.get(name) is not None}


def _riding(mask: Tensor, what: dict) -> Tensor:
    """The mask, as another object, with `what` on it."""
    mask = mask.detach()
    setattr(mask, _RIDES, what)
    return mask


def _all_tokens(model: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    """(B, N): the mask of a batch without padding."""
    tokens = argument(model, "input_ids", args, kwargs)
    tokens = argument(model, "inputs_embeds", args, kwargs) if tokens is None else tokens
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


class EnterOwnHead(EnterHead):
    """Before a model with a head: what it would hand on by keyword goes to the bare model on the mask."""

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict):
        args, kwargs = super().__call__(model, args, kwargs)
        rides = _handed_down(kwargs)
        mask = argument(model, "attention_mask", args, kwargs)
        if mask is None and rides.keys() == {KEYWORD}:
            kwargs[KEYWORD].reached = True  # there is no padding, and nothing that the bare model should know
            return args, kwargs
        mask = _riding(_all_tokens(model, args, kwargs) if mask is None else mask, rides)
        return replace_arguments(model, args, kwargs, {"attention_mask": mask})


class EnterOwnDecoder(EnterDecoder):
    """Before the bare model: padding goes, and what the layers must know gets onto the mask."""

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict):
        mask = argument(model, "attention_mask", args, kwargs)
        args, kwargs = super().__call__(model, args, {**kwargs, **getattr(mask, _RIDES, {})})
        rides = _handed_down(kwargs)
        if rides.keys() == {KEYWORD}:
            return args, kwargs  # attention has its backend, and transformers makes the mask
        mask = argument(model, "attention_mask", args, kwargs)
        tokens = _all_tokens(model, args, kwargs)
        cache = argument(model, "past_key_values", args, kwargs)
        if isinstance(cache, PromptCache):  # it holds the sequences' own keys only
            length, offset = cache.get_mask_sizes(tokens.shape[1], 0)
            tokens = tokens[:, :1].expand(-1, length)
            mask = None if mask is None else mask[:, offset : offset + length]
        mask = tokens if mask is None else mask
        mask = _riding(mask.to(torch.bool)[:, None, None], rides)
        return replace_arguments(model, args, kwargs, {"attention_mask": mask})
