"""fastattn against itself: what masks and unwanted gradients save, and what dropout costs."""

from __future__ import annotations

import functools

import torch

import fastattn

from .grid import Cell, Inputs
from .timing import interleaved_medians

__all__ = ["FIELDS", "RATIOS", "describe", "measure"]

DROPOUT_P = 0.1
# Column: the steps whose times are divided.
RATIOS = {
    "causal": ("forward causal", "forward full"),
    "padded": ("forward padded", "forward full"),
    "dropout": ("forward dropout", "forward full"),
    "backward_causal": ("backward causal", "backward full"),
    "backward_padded": ("backward padded", "backward full"),
    "backward_dropout": ("backward dropout", "backward full"),
    "dq_alone": ("backward dq", "backward full"),
    "dkdv_alone": ("backward dk dv", "backward full"),
    "dv_alone": ("backward dv", "backward full"),
}
FIELDS = ("batch", "heads", "length", "head_dim", "dtype", *RATIOS)
_VARIANTS = {
    "full": ("full", 0.0, "qkv"),  # mask, dropout_p, what gets a gradient
    "causal": ("causal", 0.0, "qkv"),
    "padded": ("padded", 0.0, "qkv"),
    "dropout": ("full", DROPOUT_P, "qkv"),
    "dq": ("full", 0.0, "q"),
    "dk dv": ("full", 0.0, "kv"),
    "dv": ("full", 0.0, "v"),
}


def measure(
    shape: tuple[int, int, int, int], dtype: str, backend: str, seconds: float, device: str = "cpu"
) -> dict:
    """A row of FIELDS: medians of one interleaved run, each divided by that of the whole problem."""
    steps = {}
    for name, (mask, dropout_p, wanted) in _VARIANTS.items():
        inputs = Inputs(Cell(*shape, mask, dtype, "forward"), device)
        forward = functools.partial(_forward, inputs, dropout_p, backend)
        if wanted == "qkv":
            steps[f"forward {name}"] = torch.no_grad()(forward)
        leaves = [getattr(inputs, tensor).requires_grad_() for tensor in wanted]
        steps[f"backward {name}"] = functools.partial(
            torch.autograd.grad, forward(), leaves, inputs.dout, retain_graph=True
        )
    medians = interleaved_medians(steps, seconds)
    row = dict(zip(FIELDS, (*shape, dtype), strict=False))
    return row | {column: medians[of] / medians[to] for column, (of, to) in RATIOS.items()}


def _forward(inputs: Inputs, dropout_p: float, backend: str) -> torch.Tensor:
    return fastattn.attention(
        inputs.q, inputs.k, inputs.v, causal=inputs.cell.mask == "causal", key_mask=inputs.key_mask,
        dropout_p=dropout_p, seed=0, backend=backend,
    )  # fmt: skip


def describe(row: dict) -> str:
    """A row as one line of text."""
    shape = "x".join(str(row[name]) for name in FIELDS[:4])
    ratios = "  ".join(f"{name} {row[name]:.2f}" for name in RATIOS)
    return f"{shape:<14} {row['dtype']:<9} {ratios}"
