"""Attention to a prompt that all sequences of a batch share, beside their own keys.

The prompt's keys and values lie there once. All queries of the batch read them together, each sequence
attends to its own keys as ever, and the two are merged by their log-sum-exps. A `PromptPass` carries them
through one forward pass as a keyword argument, as a `Call` is carried (see call.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attention import attention, merge, prefix_attention, varlen_attention
from ..errors import UnsupportedError, UnsupportedModelError

KEYWORD = "fastattn_prompt"


@dataclass(frozen=True)
class Branches:
    """Continuations in a packed row: behind all trunks lie, trunk by trunk, the sequences that continue one.

    The offsets of the pass itself hold every sequence, trunks and continuations; a continuation sees its own
    tokens causally, the whole of its trunk, and the prompt.
    """

    trunk_tokens: int
    cu_trunks: Tensor  # int32 (B + 1,): offsets of the trunks
    max_trunk: int
    cu_branches: (
        Tensor  # int32 (B + 1,): behind the trunks, offsets of each trunk's continuations, all of them
    )
    max_branches: int


@dataclass(eq=False)
class PromptPass:
    """The prompt on its way through one forward pass."""

    keys: Sequence[Tensor]  # for each layer (1, Hkv, P, D), as attention sees it: positions are in it
    values: Sequence[Tensor]  # (1, Hkv, P, Dv)
    branches: Branches | None = None
    attended: int = 0  # layers whose attention knew of the prompt

    def of_layer(self, module: nn.Module) -> tuple[Callable, Callable]:
        """`attention` and `varlen_attention` with the prompt in front, for the layer that `module` is in."""
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            raise UnsupportedModelError(f"{type(module).__name__} does not say which layer it is (layer_idx)")
        self.attended += 1
        keys, values = self.keys[layer], self.values[layer]

        def padded(q: Tensor, k: Tensor, v: Tensor, *, window=None, bias=None, **options) -> Tensor:
            if bias is not None:
                raise UnsupportedError("a mask of pairs of tokens, or a bias, with a shared prompt")
            self._check_window(window, k.shape[2])
            return prefix_attention(q, k, v, keys, values, **options)

        def packed(q: Tensor, k: Tensor, v: Tensor, *lengths, window=None, **options) -> Tensor:
            longest = options["max_seqlen_k"] + (0 if self.branches is None else self.branches.max_trunk)
            self._check_window(window, longest)
            return _packed(q, k, v, keys, values, self.branches, *lengths, **options)

        return padded, packed

    def check_attended(self, model: nn.Module, layers: int) -> None:
        """Attention must have known of the prompt in every layer; else the model never saw it there."""
        if self.attended != layers:
            raise UnsupportedModelError(
                f"{self.attended} of {layers} layers of {type(model).__name__} attended to the shared prompt"
            )

    def _check_window(self, window: tuple[int, int] | None, own: int) -> None:
        """One that reaches over prompt and sequence hides nothing; a narrower one would cut the prompt."""
        if window is None:
            return
        (left, right), total = window, self.keys[0].shape[2] + own
        if left + 1 < total or 0 < right < own - 1:
            raise UnsupportedError(
                f"a sliding window of {window[0] + 1} tokens with {total} tokens of prompt and text: every "
                "query must see the whole prompt"
            )


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    branches: Branches | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    **options,
) -> Tensor:
    """(T, Hq, Dv): each packed query over the prompt, its own sequence, and the trunk that it continues."""
    options["return_lse"] = True
    longest = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    out, lse = varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, **longest, **options)
    lse = lse.t()
    if branches is not None and branches.trunk_tokens < q.shape[0]:
        trunk, tail = slice(0, branches.trunk_tokens), slice(branches.trunk_tokens, None)
        longest = {"max_seqlen_q": branches.max_branches, "max_seqlen_k": branches.max_trunk}
        offsets = branches.cu_branches, branches.cu_trunks
        trunk_out, trunk_lse = varlen_attention(q[tail], k[trunk], v[trunk], *offsets, **longest, **options)
        tail_out, tail_lse = merge(out[tail], lse[tail], trunk_out, trunk_lse.t())
        out, lse = torch.cat((out[trunk], tail_out)), torch.cat((lse[trunk], tail_lse))
    prefix_out, prefix_lse = attention(q.transpose(0, 1)[None], prefix_k, prefix_v, **options)
    out, _ = merge(out, lse, prefix_out[0].transpose(0, 1), prefix_lse[0].t())
    return out
