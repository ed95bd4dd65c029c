"""The last layer of a model whose head reads the first position only.

What a classifier on [CLS] does not read need not be computed: behind the last layer's keys and values, one
row per sample is enough, for attention, its output projection and the whole MLP. Exact, as after the last
attention no position sees another, and gradients of rows that nobody reads are zero.

Two hooks do it. The first tells the attention function of the last layer which queries count; the second, on
the first module behind attention, keeps those rows. The first one always leaves word for the second, so that
neither an exception in between nor a layer recomputed in the backward pass can leave them at odds.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn

KEYWORD = "fastattn_first"


@dataclass(frozen=True)
class FirstRows:
    """The rows of (B, N, C), or packed (1, T, C), that hold each sample's first position."""

    rows: Tensor  # int64, positions in dimension 1
    cu_seqlens: Tensor | None  # int32 (B + 1,) = 0, 1, 2, ...: one query a sequence; None where not packed


class _Word(threading.local):
    """What the attention of a last layer left for the module behind it, in this thread."""

    rows: Tensor | None = None


_word = _Word()


@dataclass(frozen=True)
class BeforeAttention:
    """Before the last layer's attention module."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict):
        call = kwargs.get("fastattn_call")
        first = None if call is None else call.first
        _word.rows = None if first is None else first.rows
        return None if first is None else (args, {**kwargs, KEYWORD: first})


@dataclass(frozen=True)
class BehindAttention:
    """Before the first module that sees attention's output and the residual."""

    def __call__(self, module: nn.Module, args: tuple):
        rows, _word.rows = _word.rows, None
        return None if rows is None else tuple(arg.index_select(1, rows) for arg in args)


def first_rows(cu_seqlens: Tensor | None, device: torch.device) -> FirstRows:
    """For a packed batch of sequences that all have tokens, or for a padded one (cu_seqlens None)."""
    if cu_seqlens is None:
        return FirstRows(torch.zeros(1, dtype=torch.int64, device=device), None)
    one_each = torch.arange(len(cu_seqlens), dtype=torch.int32, device=device)
    return FirstRows(cu_seqlens[:-1].to(torch.int64), one_each)
