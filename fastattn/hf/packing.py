"""A batch without its padding: where the tokens lie, and the way there and back.

About half of a classification batch is padding. Packed, the tokens of all samples are one row, and attention
is told where each sequence begins. That is exact for every real token: nothing but attention mixes positions,
and attention never looks at padding. What transformers computes at the padded positions themselves is lost,
so `plan` refuses where somebody reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch import load
from .families import Reads


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a (B, N) batch lie in its packed form, a row of T."""

    batch: int
    seqlen: int
    rows: Tensor  # int64 (T,): position b * N + n of each token, ascending
    cu_seqlens: Tensor  # int32 (B + 1,)
    max_seqlen: int
    min_seqlen: int

    @property
    def keywords(self) -> dict:
        """How transformers tells attention of packed sequences."""
        offsets, longest = self.cu_seqlens, self.max_seqlen
        return {
            "cu_seq_lens_q": offsets,
            "cu_seq_lens_k": offsets,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    @property
    def is_whole(self) -> bool:
        """Whether there is no padding: every position is a token."""
        return len(self.rows) == self.batch * self.seqlen

    def pack(self, hidden: Tensor) -> Tensor:
        """(B, N, C) -> (1, T, C)"""
        if self.is_whole:
            return hidden.reshape(1, self.batch * self.seqlen, -1)
        return _Gather.apply(hidden.reshape(self.batch * self.seqlen, -1), self.rows).unsqueeze(0)

    def pad(self, hidden: Tensor) -> Tensor:
        """(1, T, C) -> (B, N, C), zero where there is no token"""
        if self.is_whole:
            return hidden.reshape(self.batch, self.seqlen, -1)
        padded = _Scatter.apply(hidden.squeeze(0), self.rows, self.batch * self.seqlen)
        return padded.view(self.batch, self.seqlen, -1)


def _kernels(matrix: Tensor):
    """The Triton kernels for a matrix on a GPU; None where torch's own are to be used."""
    if not matrix.is_cuda or torch.compiler.is_compiling() or isinstance(load("triton"), str):
        return None
    from ..backends.triton import rows

    return rows


class _Gather(torch.autograd.Function):
    """Rows of a matrix. index_select's own gradient adds; these rows are distinct, so it can copy."""

    @staticmethod
    def forward(ctx, matrix: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.height = matrix.shape[0]
        if (kernels := _kernels(matrix)) is not None:
            return kernels.unpad(matrix, rows)
        return matrix.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Scatter.apply(grad, ctx.saved_tensors[0], ctx.height), None


class _Scatter(torch.autograd.Function):
    """Rows put back into a matrix of zeros."""

    @staticmethod
    def forward(ctx, packed: Tensor, rows: Tensor, height: int) -> Tensor:
        ctx.save_for_backward(rows)
        if (kernels := _kernels(packed)) is not None:
            return kernels.pad(packed, rows, height)
        return packed.new_zeros(height, packed.shape[1]).index_copy_(0, rows, packed)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Gather.apply(grad, ctx.saved_tensors[0]), None, None


@torch.compiler.disable
def plan(
    mask: Tensor,
    reads: Reads,
    labels: Tensor | None = None,
    last: Tensor | None = None,
    contiguous: bool = False,
) -> Layout | str | None:
    """The layout of a batch with this (B, N) bool mask; None if it has no padding; a string if its padding is
    read.

    labels are the head's for Reads.LABELLED and NEXT, last the position (B,) it reads for Reads.LAST and EOS.
    contiguous: refuse padding between tokens, where the model looks at distances. The mask's values are read
    once: on a GPU the one point where the host waits.
    """
    lengths = mask.sum(dim=1, dtype=torch.int32)
    # A sample with no token at all has nothing to lose.
    some = lengths > 0
    read, reason = torch.zeros_like(some), ""
    if reads in (Reads.FIRST, Reads.BARE):
        read, reason = (
            ~mask[:, 0] & some,
            "a sample's first position is masked (left padding), and it may be read",
        )
    elif reads in (Reads.LAST, Reads.EOS):
        read = ~mask.gather(1, last[:, None]).squeeze(1) & some
        reason = "the position that the head reads is masked"
    elif labels is not None and reads in (Reads.LABELLED, Reads.NEXT):
        if labels.shape != mask.shape:
            return (
                f"labels of shape {tuple(labels.shape)} do not match the attention mask's {tuple(mask.shape)}"
            )
        counts = labels != -100
        reason = "a masked position has a label other than -100, so its output counts in the loss"
        read = (counts[:, 1:] & ~mask[:, :-1]) if reads is Reads.NEXT else (counts & ~mask)
    holes = torch.zeros_like(some)
    if contiguous:
        runs = mask[:, 0].to(torch.int32) + (mask[:, 1:] & ~mask[:, :-1]).sum(dim=1, dtype=torch.int32)
        holes = runs > 1
    facts = [lengths.sum(), lengths.max(), lengths.min(), read.any().to(torch.int32)]
    facts.append(holes.any().to(torch.int32))
    total, longest, shortest, is_read, has_holes = torch.stack(facts).tolist()
    if total == mask.numel():
        return None
    if is_read:
        return reason
    if has_holes:
        return "masked positions lie between tokens, whose distances this model looks at"
    if total == 0:
        return "no sample has a token"
    rows = torch.nonzero_static(mask.flatten(), size=total).squeeze(1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return Layout(mask.shape[0], mask.shape[1], rows, cu_seqlens, longest, shortest)


def whole(batch: int, seqlen: int, device: torch.device) -> Layout:
    """The layout of a batch without padding, to go with another that has some."""
    rows = torch.arange(batch * seqlen, device=device)
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen
    return Layout(batch, seqlen, rows, cu_seqlens, seqlen, seqlen)
