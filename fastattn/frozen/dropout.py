"""Dropout of hidden states without a stored mask and without torch's serial generator on the CPU.

Which elements are kept is a function of a seed and of (sequence, position, channel), the stream of
attention's dropout (philox.py) with h = 0: so it depends neither on padding nor on packing, backward draws it
once more, and threads share the work. The seed comes from torch's default generator. docs/architecture.md
has the contract.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from .. import dispatch, ops
from ..log import log_once
from .classes import replace_classes, restore_classes
from .recorder import current

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Packing(threading.local):
    """Where the sequences begin in the packed row that this thread works on."""

    cu_seqlens: Tensor | None = None
    total: int = 0


_packing = _Packing()


def set_packing(cu_seqlens: Tensor | None, total: int = 0) -> None:
    """From now on a (1, total, C) tensor is these sequences (int32 offsets), and a (1, B, C) one their first
    positions. What was set before and is not true any more does no harm: every keying drops alike.
    """
    if not torch.compiler.is_compiling():
        _packing.cu_seqlens, _packing.total = cu_seqlens, total


class Dropout(nn.Dropout):
    """nn.Dropout as patch makes it, in place of its class: the same module with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        active = self.training and 0 < self.p < 1 and not self.inplace and x.dim() > 1
        if not active or torch.compiler.is_compiling() or not _computes(x):
            return super().forward(x)
        seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
        rows, seqlen, cu_seqlens = _keying(x)
        out = ops.hidden_dropout(rows, seed, cu_seqlens, seqlen, self.p).view(x.shape)
        recorder = current()
        if recorder is not None and out.requires_grad:
            shape, p = x.shape, self.p

            def again(x: Tensor) -> tuple[Tensor]:
                with torch.no_grad():
                    rows = x.reshape(-1, x.shape[-1])
                    return (ops.hidden_dropout(rows, seed, cu_seqlens, seqlen, p).view(shape),)

            recorder.offer(out, again, x)
        return out


def _computes(x: Tensor) -> bool:
    """Whether the op takes it; torch's own dropout is parallel on GPUs, and fused by its compiler."""
    if x.device.type != "cpu" or x.dtype not in _DTYPES or type(x) is not Tensor:
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    reason = dispatch.load("cpu")
    if isinstance(reason, str):
        log_once(f"dropout of hidden states is torch's, serial and with a stored mask: {reason}")
        return False
    return True


def _keying(x: Tensor) -> tuple[Tensor, int, Tensor | None]:
    """x as rows, and which position of which sequence they are: row r is r % seqlen of r // seqlen, or as the
    offsets say."""
    rows = x.reshape(-1, x.shape[-1])
    if x.dim() == 2:
        return rows, 1, None
    cu_seqlens = _packing.cu_seqlens
    if cu_seqlens is not None and x.dim() == 3 and x.shape[0] == 1:
        if x.shape[1] == _packing.total:
            return rows, 1, cu_seqlens.to(torch.int32)
        if x.shape[1] == len(cu_seqlens) - 1:
            return rows, 1, None
    return rows, max(1, x.shape[-2]), None


def replace_dropouts(model: nn.Module) -> None:
    """Every plain nn.Dropout in it drops as above from now on."""
    replace_classes(model, {nn.Dropout: Dropout})


def restore_dropouts(model: nn.Module) -> None:
    restore_classes(model, {nn.Dropout: Dropout})
