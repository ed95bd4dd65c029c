"""Decoders whose attention does not call transformers' AttentionInterface, and takes no keyword arguments.

They compute it in a method `_attn` from q, k, v and a mask. ../own_attention.py puts a class with another one
in the place of theirs; here stands what has to be known of it, and `check` runs it on a few tokens to see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from . import DecoderFamily, Reads, is_transformers

_ATTRIBUTE = "_fastattn_attention"


@dataclass(frozen=True)
class Replaced:
    """On an attention module whose class patch replaced: what to give back, and the backend chosen."""

    original: type
    backend: str


def replace(attention: nn.Module, other: type, backend: str) -> None:
    setattr(attention, _ATTRIBUTE, Replaced(type(attention), backend))
    attention.__class__ = other


def replaced(attention: nn.Module) -> Replaced | None:
    return vars(attention).get(_ATTRIBUTE)


def restore_attentions(model: nn.Module) -> None:
    """Every attention in it gets its own class back."""
    for module in model.modules():
        if (before := replaced(module)) is not None:
            module.__class__ = before.original
            delattr(module, _ATTRIBUTE)


@dataclass(frozen=True, kw_only=True)
class OwnAttentionFamily(DecoderFamily):
    """A decoder with an attention of its own."""

    attention_class: str  # the one with the plain formula
    uses: tuple[str, ...]  # what its _attn reads of the module, beside attn_dropout
    scale: Callable[[nn.Module], float]
    window: Callable[[nn.Module], int | None]  # keys that a query sees, its own included

    def contiguous(self, base: nn.Module) -> bool:
        return any(self.window(attention) is not None for attention in self.attention_modules(base))

    def check(self, base: nn.Module) -> None:
        super().check(base)
        kinds = {}
        for attention in self.attention_modules(base):
            kinds.setdefault((type(attention), self._formula(attention)), attention)
        for attention in kinds.values():
            self._check_formula(attention)

    def _formula(self, attention: nn.Module) -> tuple[float, int | None]:
        try:
            return float(self.scale(attention)), self.window(attention)
        except AttributeError as error:
            raise self._mismatch(attention, str(error)) from error

    @torch.no_grad()
    def _check_formula(self, attention: nn.Module) -> None:
        """Their `_attn` must be softmax(scale q k + mask) v, within the window."""
        classes = filter(is_transformers, type(attention).__mro__)
        theirs = next((cls for cls in classes if cls.__name__ == self.attention_class), None)
        if theirs is None or not hasattr(theirs, "_attn"):
            raise self._mismatch(attention, f"its attention is no {self.attention_class} with a method _attn")
        scale, window = self._formula(attention)
        tokens = min(9 if window is None else window + 3, attention.config.max_position_embeddings)
        q, k, v = torch.randn(3, 1, 1, tokens, 8, generator=torch.Generator().manual_seed(0), device="cpu")
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
        hidden = distance < 0
        causal = torch.zeros(1, 1, tokens, tokens).masked_fill(hidden, torch.finfo(torch.float32).min)
        try:
            values = {name: getattr(attention, name) for name in self.uses}
            if any(isinstance(value, Tensor) and value.is_meta for value in values.values()):
                return
            values = {
                n: v[..., :tokens, :tokens].cpu() if isinstance(v, Tensor) else v for n, v in values.items()
            }
            stand_in = SimpleNamespace(attn_dropout=nn.Identity(), **values)
            found, _ = theirs._attn(stand_in, q, k, v, causal)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise self._mismatch(attention, f"{self.attention_class}._attn: {error}") from error
        if window is not None:
            hidden = hidden | (distance >= window)
        expected = (q @ k.mT * scale).masked_fill(hidden, float("-inf")).softmax(-1) @ v
        if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-5):
            raise self._mismatch(attention, f"{self.attention_class}._attn computes something else")


def _one(attention: nn.Module) -> float:
    return 1.0


def _over_their_divisor(attention: nn.Module) -> float:
    return 1 / attention.scale_attn


def _none(attention: nn.Module) -> None:
    return None


def _window_of_local_layers(attention: nn.Module) -> int | None:
    return attention.config.window_size if attention.attention_type == "local" else None


_GPT_NEO = OwnAttentionFamily(
    model_type="gpt_neo",
    base="GPTNeoModel",
    layers="h",
    attention="attn.attention",
    attention_class="GPTNeoSelfAttention",
    uses=("bias",),  # causality and window
    scale=_one,
    window=_window_of_local_layers,
    heads=(
        ("GPTNeoForCausalLM", Reads.NEXT),
        ("GPTNeoForSequenceClassification", Reads.LAST),
        ("GPTNeoForTokenClassification", Reads.LABELLED),
    ),
)
_GPTJ = OwnAttentionFamily(
    model_type="gptj",
    base="GPTJModel",
    layers="h",
    attention="attn",
    attention_class="GPTJAttention",
    uses=("scale_attn",),
    scale=_over_their_divisor,
    window=_none,
    heads=(("GPTJForCausalLM", Reads.NEXT), ("GPTJForSequenceClassification", Reads.LAST)),
)

FAMILIES = (_GPT_NEO, _GPTJ)
