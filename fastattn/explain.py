"""explain(): what a call would do, without doing it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import dispatch, ops
from .attention import Window, normalise
from .errors import BackendUnavailableError, UnsupportedError
from .problem import AttentionInputs, AttentionProblem, check_offsets, describe


@dataclass(frozen=True)
class Explanation:
    """What a call would do. `str()` gives it as a short text."""

    problem: AttentionProblem = field(repr=False)
    backend: str | None
    """The backend that would compute it; None if none can."""
    kernel: str
    """The kernel in that backend: instruction set or architecture, tiles."""
    refused: dict[str, str]
    """Why each other backend is not the one."""
    forward_flops: int
    """Multiplications and additions of q k^T and p v over the pairs that causal and window leave visible."""
    backward_flops: int
    """The same for the gradients that the tensors ask for as they are now, q k^T again included."""
    saved_bytes: int
    """Bytes kept from forward to backward, every storage counted once; 0 when no gradient is needed."""

    def __str__(self) -> str:
        chosen = f"{self.backend} ({self.kernel})" if self.backend else "none"
        return "\n".join(
            [
                dispatch.summary(self.problem),
                f"  computed by {chosen}",
                f"  forward {self.forward_flops / 1e9:.3f} GFLOP",
                f"  backward {self.backward_flops / 1e9:.3f} GFLOP",
                f"  saved for backward: {self.saved_bytes} bytes",
                *(f"  not {name}: {reason}" for name, reason in self.refused.items()),
            ]
        )


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = 0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Explanation:
    """What `attention` (or `varlen_attention`, where cu_seqlens_q is given) would do with these arguments.

    Nothing is computed but the lengths in cu_seqlens. Arguments and InvalidArgumentError are theirs; a
    problem that no backend can serve is no error here, but an Explanation whose backend is None.
    """
    if cu_seqlens_q is not None:
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        max_seqlen_q = _longest(cu_seqlens_q) if max_seqlen_q is None else max_seqlen_q
        max_seqlen_k = _longest(cu_seqlens_k) if max_seqlen_k is None else max_seqlen_k
    inputs, options = normalise(
        AttentionInputs(q, k, v, key_mask, bias, relative_bias, alibi_slopes, cu_seqlens_q, cu_seqlens_k),
        max_seqlen_q or 0, max_seqlen_k or 0, causal, scale, window, softcap, dropout_p, seed, backend,
    )  # fmt: skip
    needs = ops.gradients_needed(inputs)
    if torch.is_autocast_enabled(q.device.type):
        inputs = AttentionInputs(*ops.cast_for_autocast(q.device.type, inputs[:3]), *inputs[3:])
    problem = describe(inputs, options, any(needs))
    chosen, kernel, refused = _choose(problem, backend)
    pairs = _visible_pairs(problem, inputs)
    return Explanation(
        problem=problem,
        backend=chosen,
        kernel=kernel,
        refused=refused,
        forward_flops=2 * (problem.head_dim + problem.head_dim_v) * pairs,
        backward_flops=_backward_flops(problem, needs, pairs),
        saved_bytes=_saved_bytes(problem, inputs) if any(needs) else 0,
    )


def _choose(problem: AttentionProblem, backend: str) -> tuple[str | None, str, dict[str, str]]:
    if backend == "reference":
        return backend, "plain PyTorch", {}
    candidate, refused = dispatch.survey(problem)
    if backend != "auto":
        try:
            candidate = dispatch.choose(problem, backend)
        except (UnsupportedError, BackendUnavailableError) as error:
            return None, "", {backend: str(error)}
        refused = {
            name: f"backend={backend!r} was asked for"
            for name in dispatch.BACKEND_NAMES[1:]
            if name != backend
        }
    if candidate is None:
        return None, "", refused
    return candidate.name, candidate.kernel(problem), refused


def _visible_pairs(problem: AttentionProblem, inputs: AttentionInputs) -> int:
    """(query, key) pairs over all sequences and query heads."""
    if problem.packed:
        starts_q = check_offsets("cu_seqlens_q", inputs.cu_seqlens_q, problem.total_q, problem.seqlen_q)
        starts_k = check_offsets("cu_seqlens_k", inputs.cu_seqlens_k, problem.total_k, problem.seqlen_k)
        lengths = list(zip(_steps(starts_q), _steps(starts_k), strict=True))
    else:
        lengths = [(problem.seqlen_q, problem.seqlen_k)] * problem.batch
    per_length = {pair: _visible_in_one(problem, *pair) for pair in set(lengths)}
    return problem.num_heads * sum(per_length[pair] for pair in lengths)


def _visible_in_one(problem: AttentionProblem, seqlen_q: int, seqlen_k: int) -> int:
    diagonal = torch.arange(seqlen_q) + seqlen_k - seqlen_q
    first = torch.zeros_like(diagonal) if problem.window_left < 0 else diagonal - problem.window_left
    last = torch.full_like(diagonal, seqlen_k - 1)
    if problem.causal:
        last = torch.minimum(last, diagonal)
    if problem.window_right >= 0:
        last = torch.minimum(last, diagonal + problem.window_right)
    return int((last - first.clamp(min=0) + 1).clamp(min=0).sum())


def _backward_flops(problem: AttentionProblem, needs: tuple[bool, ...], pairs: int) -> int:
    """q k^T again, do v^T where scores get a gradient, and one product for each of dq, dk and dv."""
    need_q, need_k, need_v, *_ = needs
    if not any(needs):
        return 0
    of_scores = any(needed for needed, name in zip(needs, ops.DIFFERENTIABLE, strict=True) if name != "v")
    qk_products = 1 + need_q + need_k
    v_products = of_scores + need_v
    return 2 * pairs * (problem.head_dim * qk_products + problem.head_dim_v * v_products)


def _saved_bytes(problem: AttentionProblem, inputs: AttentionInputs) -> int:
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in inputs if x is not None}
    rows = problem.num_heads * problem.total_q
    out_and_lse = rows * problem.head_dim_v * inputs.q.element_size() + rows * 4
    return sum(storages.values()) + out_and_lse


def _steps(offsets: list[int]) -> list[int]:
    return [end - start for start, end in itertools.pairwise(offsets)]


def _longest(offsets: Tensor) -> int:
    return max(_steps(offsets.tolist()), default=0)
