"""What is timed: shapes, masks, dtypes, and their useful arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["DTYPES", "MASKS", "PASSES", "SHAPES", "Cell", "Inputs"]

# (batch, heads, length, head_dim): from what classifiers run on short texts to one long document.
SHAPES = (
    (32, 12, 32, 32),
    (32, 12, 128, 32),
    (32, 12, 128, 64),
    (8, 12, 512, 32),
    (8, 12, 512, 64),
    (1, 12, 2048, 64),
    (1, 8, 2048, 128),
    (1, 8, 8192, 128),
)
MASKS = ("full", "causal", "padded")
PASSES = ("forward", "forward+backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Cell:
    """One row of the result: a problem in one dtype and one pass.

    mask: "padded" hides the second half of every sequence's keys.
    """

    batch: int
    heads: int
    length: int
    head_dim: int
    mask: str
    dtype: str
    direction: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.length, self.head_dim

    @property
    def visible(self) -> float:
        """The share of all query-key pairs that the mask leaves."""
        return {"full": 1.0, "causal": (self.length + 1) / (2 * self.length), "padded": 0.5}[self.mask]

    @property
    def flops(self) -> float:
        """Of the matrix products alone, on visible pairs: 2 of 2 FLOPs forward, 5 more backward."""
        forward = 4 * self.batch * self.heads * self.length**2 * self.head_dim * self.visible
        return forward * (3.5 if self.direction == "forward+backward" else 1.0)

    @property
    def bytes(self) -> float:
        """That must be moved at least once: q, k, v, out; and with backward also dout, dq, dk, dv."""
        width = DTYPES[self.dtype].itemsize
        rows = 4 if self.direction == "forward" else 12  # backward reads the first four again
        return rows * width * self.batch * self.heads * self.length * self.head_dim


class Inputs:
    """Fresh tensors of a cell; every contender computes on the same ones."""

    def __init__(self, cell: Cell, device: str = "cpu"):
        dtype = DTYPES[cell.dtype]
        self.cell = cell
        self.with_backward = cell.direction == "forward+backward"
        generator = torch.Generator(device).manual_seed(0)
        self.q, self.k, self.v, self.dout = (
            torch.randn(cell.shape, generator=generator, device=device).to(dtype) for _ in range(4)
        )
        for tensor in (self.q, self.k, self.v):
            tensor.requires_grad_(self.with_backward)
        self.key_mask = None
        if cell.mask == "padded":
            self.key_mask = torch.arange(cell.length, device=device) < cell.length // 2
            self.key_mask = self.key_mask.expand(cell.batch, cell.length).contiguous()
