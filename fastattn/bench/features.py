"""Grouped heads, packed sequences, decoding and dropout, each beside torch's own attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import fastattn

from .grid import DTYPES
from .timing import interleaved_medians

__all__ = ["FEATURES", "FIELDS", "describe", "measure", "problem"]

DROPOUT_P = 0.1
GROUP = 4  # query heads of a kv head, where heads are grouped and there are as many
FEATURES = ("grouped", "packed", "decode", "dropout")
FIELDS = ("batch", "heads", "length", "head_dim", "dtype", "feature", "direction", "fastattn_ms", "sdpa_ms")
Function = Callable[..., torch.Tensor]


def problem(
    feature: str, shape: tuple[int, int, int, int], dtype: str, backend: str, device: str = "cpu"
) -> tuple[Function, list[torch.Tensor], Function, list[torch.Tensor]]:
    """(fastattn, its q, k and v, torch's attention, those that it takes): the same numbers for both.

    grouped: causal, GROUP query heads a kv head. packed: sequences of half the length and more, in evenly
    growing steps, without padding; torch takes them padded, with a mask. decode: one query a sequence, heads
    grouped. dropout: as for training, without another mask.
    """
    batch, heads, length, head_dim = shape
    kv_heads = heads if feature in ("packed", "dropout") else max(1, heads // GROUP)
    rows = 1 if feature == "decode" else length
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(batch, h, n, head_dim, generator=generator, device=device).to(DTYPES[dtype])
        for h, n in ((heads, rows), (kv_heads, length), (kv_heads, length))
    )
    ours = functools.partial(fastattn.attention, backend=backend)
    theirs = functools.partial(F.scaled_dot_product_attention, enable_gqa=kv_heads < heads)
    taken = [q, k, v]
    if feature == "grouped":
        ours, theirs = functools.partial(ours, causal=True), functools.partial(theirs, is_causal=True)
    elif feature == "dropout":
        ours = functools.partial(ours, dropout_p=DROPOUT_P)
        theirs = functools.partial(theirs, dropout_p=DROPOUT_P)
    elif feature == "packed":
        lengths = torch.linspace(max(1, length // 2), length, batch).long().to(device)
        tokens = torch.arange(length, device=device) < lengths[:, None]
        taken = [x.transpose(1, 2)[tokens] for x in (q, k, v)]
        offsets = F.pad(lengths.cumsum(0), (1, 0)).int()
        ours = functools.partial(
            fastattn.varlen_attention, cu_seqlens_q=offsets, max_seqlen_q=length, backend=backend
        )
        theirs = functools.partial(theirs, attn_mask=tokens[:, None, None, :])
    return ours, taken, theirs, [q, k, v]


def measure(
    shape: tuple[int, int, int, int], dtype: str, backend: str, seconds: float, device: str = "cpu"
) -> Iterator[dict]:
    """Rows of FIELDS: medians of interleaved rounds, forward and, but for decoding, forward and backward."""
    for feature in FEATURES:
        ours, taken, theirs, padded = problem(feature, shape, dtype, backend, device)
        steps = {"fastattn": (ours, taken), "sdpa": (theirs, padded)}
        for direction in ("forward",) if feature == "decode" else ("forward", "forward+backward"):
            backward = direction != "forward"
            medians = interleaved_medians(
                {name: functools.partial(_step, *step, backward) for name, step in steps.items()}, seconds
            )
            times = (medians[name] * 1e3 for name in steps)
            yield dict(zip(FIELDS, (*shape, dtype, feature, direction, *times), strict=True))


def _step(attention: Function, inputs: list[torch.Tensor], backward: bool) -> None:
    if not backward:
        with torch.no_grad():
            attention(*inputs)
        return
    leaves = [x.requires_grad_() for x in inputs]
    out = attention(*leaves)
    torch.autograd.grad(out, leaves, out.detach())


def describe(row: dict) -> str:
    """A row as one line of text."""
    shape = "x".join(str(row[name]) for name in FIELDS[:4])
    ratio = row["sdpa_ms"] / row["fastattn_ms"]
    return (
        f"{shape:<14} {row['dtype']:<9} {row['feature']:<8} {row['direction']:<16} "
        f"{row['fastattn_ms']:.3f} ms  sdpa {ratio:.2f}"
    )
