"""Whether the CUDA C++ kernels come before Triton's where both can serve.

By a model, since no GPU has timed them: that of docs/performance-gpu.md and docs/performance-cuda.md. It
counts the issue slots that the loop over unmasked tiles takes for each cycle of the tensor cores that its
products need. What has not been counted stays Triton's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..problem import AttentionProblem

_TILES = (32, 64, 96, 128, 256)  # head dimensions that the CUDA kernels have; others are padded to the next
_LEAST_ROWS = 128  # fewer don't fill a tile: then it is not the loop that takes the time
_SETTLED = 512  # keys from which few tiles move the base of the softmax
_LEAST_GAIN = 0.05  # less is not what such a model can tell


class Slots(NamedTuple):
    """Issue slots for each tensor cycle that is needed; None: not counted, or no kernel of its own."""

    forward: float
    dq: float | None = None
    dkdv: float | None = None
    moving: float = 0.0
    """What forward takes more in a tile where the base of the softmax moves; Triton's always does."""


# (compute capability, head dimension, what is done to scores): Triton's, and those of csrc/cuda; 16 bits.
FIGURES = {
    (80, 32, "plain"): (Slots(0.96, 0.71, 0.95), Slots(0.83, 0.55, 0.57, moving=0.18)),
    (80, 64, "plain"): (Slots(0.61, 0.47, 0.61), Slots(0.51, 0.38, 0.39, moving=0.12)),
    (80, 96, "plain"): (Slots(0.83, 0.57, 0.61), Slots(0.43, 0.34, 0.38, moving=0.10)),
    (80, 128, "plain"): (Slots(0.43, 0.42, 0.45), Slots(0.38, 0.30, 0.33, moving=0.09)),
    (80, 256, "plain"): (Slots(0.68, 0.58, 0.96), Slots(0.33, 0.31, 0.47, moving=0.15)),
    (80, 64, "dropout"): (Slots(1.64, 1.11, 2.04), Slots(1.35, 0.91, 0.62, moving=0.12)),
    (80, 128, "dropout"): (Slots(0.95, 1.19, 0.93), Slots(0.78, 0.79, 0.50, moving=0.09)),
    (80, 64, "softcap"): (Slots(1.86, 1.28, 1.22), Slots(1.00, 0.71, 0.64, moving=0.12)),
    (80, 128, "softcap"): (Slots(1.06, 0.83, 0.74), Slots(0.60, 0.46, 0.45, moving=0.09)),
    (90, 64, "plain"): (Slots(0.91, 0.70, 0.94), Slots(0.75, 0.50, 0.49, moving=0.12)),
    (90, 96, "plain"): (Slots(0.71, 0.58, 0.96), Slots(0.51, 0.45, 0.37, moving=0.12)),
    (90, 128, "plain"): (Slots(0.52, 0.43, 0.72), Slots(0.38, 0.34, 0.28, moving=0.09)),
    (90, 256, "plain"): (Slots(0.48, 0.51, 1.43), Slots(0.26, 0.25, 0.30, moving=0.15)),
}


def cuda_first(problem: AttentionProblem, capability: int) -> str | None:
    """Why the CUDA kernels come first for this problem, in words; None where Triton's do.

    capability: 10 * major + minor of the device's compute capability.
    """
    figures = FIGURES.get((capability, _tile(problem), _scores(problem)))
    if figures is None or problem.dtype not in (torch.float16, torch.bfloat16):
        return None
    if min(problem.seqlen_q, problem.seqlen_k) < _LEAST_ROWS:
        return None
    triton, cuda = (_slots(slots, problem) for slots in figures)
    if triton is None or cuda is None or cuda > (1 - _LEAST_GAIN) * triton:
        return None
    passes = "forward and backward" if problem.need_grad else "forward"
    return (
        f"preferred by the model, not measured (issue slots per tensor cycle, {passes}: cuda {cuda:.2f}, "
        f"triton {triton:.2f})"
    )


def _slots(slots: Slots, problem: AttentionProblem) -> float | None:
    """The mean over passes, by their number of products: 2 in forward, 3 for dq, 4 for dk and dv."""
    forward = slots.forward + (slots.moving if problem.seqlen_k < _SETTLED else 0.0)
    if not problem.need_grad:
        return forward
    if slots.dq is None or slots.dkdv is None:
        return None
    return (2 * forward + 3 * slots.dq + 4 * slots.dkdv) / 9


def _tile(problem: AttentionProblem) -> int | None:
    """The head dimension that both kernels compute with; None where v's is another or theirs differ."""
    tile, tile_v = (
        next(tile for tile in _TILES if dim <= tile) for dim in (problem.head_dim, problem.head_dim_v)
    )
    return tile if tile == tile_v and problem.head_dim > 16 else None  # Triton has tiles of 16


def _scores(problem: AttentionProblem) -> str | None:
    """What FIGURES calls this; None where the loops differ from all that have been counted."""
    if problem.has_key_mask or problem.bias_shape or problem.has_relative_bias or problem.alibi_shape:
        return None
    if problem.window_left >= 0 or problem.window_right >= 0 or problem.softmax_scale <= 0:
        return None
    if problem.softcap and problem.dropout_p:
        return None
    return "softcap" if problem.softcap else "dropout" if problem.dropout_p else "plain"
