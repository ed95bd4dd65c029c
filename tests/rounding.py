"""How far rounding takes each result of attention from the exact one: standard deviations, to first order.

A kernel may round the weights P, the gradients dS of the scores and its results to the dtype, and all else
to float32. These errors are independent, so the deviation of a sum is the root of its terms' squares, where a
bound would add up largest magnitudes; what a whole row shares (delta, lse) is summed before it is squared.

    out_i = sum_j P_ij v_j         dS_ij = P_ij (dP_ij - delta_i)      delta_i = out_i . dout_i - dlse_i
    dv_j = sum_i P_ij dout_i       dq_i = sum_j dS_ij k_j              dk_j = sum_i dS_ij q_i
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn import philox, reference

FP32 = torch.finfo(torch.float32).eps / 2
LEAST = torch.finfo(torch.float32).smallest_normal
"""Weights below it may count as 0: an exponential that gives the least bits of them would cost more. In
bfloat16 any operand or product may: x86's matrix instructions know no denormal numbers."""


@dataclass
class Inside:
    """What the reference had in hand between its inputs and results; (B, Hq, Nq, Nk) each."""

    weights: Tensor
    kept: Tensor | float = 1.0
    """What dropout multiplies the weights with."""
    dscores: Tensor | float = 0.0


@contextlib.contextmanager
def watched():
    """A list that receives an Inside of every sequence, or padded batch, that the reference computes."""
    seen: list[Inside] = []
    softmax, keep_mask = reference._softmax, philox.keep_mask

    def watched_softmax(scores):
        weights, lse = softmax(scores)
        inside = Inside(weights.detach())
        seen.append(inside)
        if scores.requires_grad:
            scores.register_hook(lambda gradient: setattr(inside, "dscores", gradient))
        return weights, lse

    def watched_keep_mask(seed, dropout_p, **more):
        keep = keep_mask(seed, dropout_p, **more)
        seen[-1].kept = keep * philox.keep_scale(dropout_p)
        return keep

    reference._softmax, philox.keep_mask = watched_softmax, watched_keep_mask
    try:
        yield seen
    finally:
        reference._softmax, philox.keep_mask = softmax, keep_mask


def deviations(case, tensors, upstream, exact, seen: list[Inside]) -> dict[str, Tensor]:
    """The deviation of every element of `exact`, the reference's results in float64, by name."""
    steps_q = steps_k = None
    if case.packed:
        steps_q, steps_k = (tensors[f"cu_seqlens_{side}"].tolist() for side in "qk")
    rows_of = {
        "q": steps_q,
        "k": steps_k,
        "v": steps_k,
        "out": steps_q,
        "dq": steps_q,
        "dk": steps_k,
        "dv": steps_k,
    }
    given = {
        name: _sequences(x.double(), rows_of[name])
        for name, x in (tensors | exact).items()
        if name in rows_of
    }
    given["dout"] = _sequences(upstream["out"].double(), steps_q)
    for name, x in (("lse", exact["lse"]), ("dlse", upstream["lse"] * case.use_lse)):
        given[name] = [
            y[..., 0] for y in _sequences(x.mT[..., None] if case.packed else x[..., None], steps_q)
        ]
    found = []
    for b, inside in enumerate(seen):
        found.append(_deviations(case, {name: parts[b] for name, parts in given.items()}, inside))
    result = {}
    for name in exact:
        parts = [part[name] for part in found if name in part]
        if name == "dbias":
            result[name] = _of_bias(case, exact[name], tensors["bias"], parts)
        elif name == "drelative_bias":
            result[name] = _of_diagonals(case, exact[name], parts)
        elif name == "lse":
            result[name] = torch.cat([x[0] for x in parts], dim=1) if case.packed else parts[0]
        else:
            result[name] = torch.cat([x[0].transpose(0, 1) for x in parts]) if case.packed else parts[0]
    return result


def _sequences(x: Tensor, steps: list[int] | None) -> list[Tensor]:
    """A padded batch as it is; packed rows as a batch of one for each sequence."""
    if steps is None:
        return [x]
    return [x[begin:end].transpose(0, 1)[None] for begin, end in itertools.pairwise(steps)]


def _rounding(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest error of x rounded to dtype, also where x is so small that few of its bits are left."""
    info = torch.finfo(dtype)
    return info.eps / 2 * (x.abs() + info.smallest_normal * (x != 0.0))


def _deviations(case, x: dict[str, Tensor], inside: Inside) -> dict[str, Tensor]:
    """For one sequence or padded batch; a bias gets (independent by cell, shared by row) instead."""
    scale = abs(case.options.get("scale", case.head_dim**-0.5))
    k, v = (x[name].repeat_interleave(case.group, dim=1) for name in "kv")
    q, dout, weights = x["q"], x["dout"], inside.weights
    # What the order of a sum costs in float32, whose partial sums grow like a random walk.
    steps = FP32 * max(q.shape[2] * case.group, k.shape[2]) ** 0.5
    lse = x["lse"].masked_fill(x["lse"].isinf(), 0.0)[..., None].abs()
    # An error of a score is a relative error of its weight: the rounding of score and lse, that of q k^T, and
    # an exponential good to four units.
    scores = torch.where(weights > 0.0, weights.log() + lse, 0.0).abs()
    relative = FP32 * (4.0 + scores + lse + scale * _norm(q) * _norm(k).mT)
    dropped = weights * inside.kept
    of_dropped = _rounding(dropped, case.dtype) ** 2 + ((relative + steps) * dropped) ** 2
    least = LEAST * (weights > 0.0).double()
    flushed = 0.0
    if case.dtype is torch.bfloat16:  # dropout's scale would have multiplied it later on
        flushed = LEAST * philox.keep_scale(case.options.get("dropout_p", 0.0))
    of_dropped += (least * inside.kept) ** 2

    def of_flushed(results: Tensor) -> Tensor:
        return (flushed * (results != 0.0).double()) ** 2

    def result(name: str) -> Tensor:
        return (_rounding(x[name], case.dtype) + steps * x[name].abs()) ** 2 + of_flushed(x[name])

    found = {"lse": FP32 * (1.0 + lse[..., 0]) + (relative * weights).norm(dim=-1)}
    of_out = of_dropped @ v**2 + result("out")
    found["out"] = of_out.sqrt()
    if "dv" in x:
        found["dv"] = (_over_group(of_dropped.mT @ dout**2, case) + result("dv")).sqrt()
    if isinstance(inside.dscores, float):
        return found | {name: torch.zeros_like(x[name]) for name in ("dq", "dk") if name in x}

    slope, of_slope = scale, 0.0
    if case.options.get("softcap", 0.0) > 0.0:
        slope = scale * (1.0 - torch.tanh(scale * q @ k.mT / case.options["softcap"]) ** 2)
        of_slope = 4.0 * FP32 * scale  # 1 - tanh^2 cancels, so its error is absolute
    of_delta = (of_out * dout**2).sum(-1, keepdim=True).sqrt() + FP32 * x["dlse"][..., None].abs()
    delta = ((x["out"] * dout).sum(-1) - x["dlse"])[..., None].abs()
    dweights = _norm(dout) * _norm(v).mT * inside.kept + delta
    cell = _rounding(inside.dscores, case.dtype) ** 2 + ((relative + steps) * inside.dscores) ** 2
    cell += ((FP32 * weights + least) * dweights) ** 2 + of_flushed(inside.dscores)
    row = weights * of_delta
    found["dbias"] = found["drelative_bias"] = (cell, row)
    cell, row = cell * slope**2 + (inside.dscores * of_slope) ** 2, row * slope
    if "dq" in x:
        shared = (row @ k) ** 2 + (FP32 * lse * x["dq"]) ** 2
        found["dq"] = (cell @ k**2 + shared + result("dq")).sqrt()
    if "dk" in x:
        found["dk"] = (_over_group((cell + row**2).mT @ q**2, case) + result("dk")).sqrt()
    return found


def _norm(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True)


def _over_group(x: Tensor, case) -> Tensor:
    """Sums over the query heads of each kv head."""
    return x.unflatten(1, (case.kv_heads, case.group)).sum(2)


def _of_bias(case, exact: Tensor, bias: Tensor, parts) -> Tensor:
    """The sum over the axes that the bias lacks."""
    summed = [axis for axis in range(4) if bias.shape[axis] == 1]
    variance = torch.zeros_like(exact)
    for b, (cell, row) in enumerate(parts):
        if bias.shape[3] == 1:
            cell, row = cell.sum(3, keepdim=True), row.sum(3, keepdim=True)
        of_part = cell + row**2
        for axis in summed:
            of_part = of_part.sum(axis, keepdim=True)
        at = (slice(b, b + 1) if case.packed and bias.shape[0] > 1 else slice(None), slice(None))
        variance[(*at, slice(of_part.shape[2]), slice(of_part.shape[3]))] += of_part
    return (variance + _rounding(exact, case.dtype) ** 2).sqrt()


def _of_diagonals(case, exact: Tensor, parts) -> Tensor:
    longest = max(pair[0] for pair in case.lengths)
    variance = torch.zeros_like(exact)
    for cell, row in parts:
        i, j = (torch.arange(n, device=exact.device) for n in cell.shape[2:])
        diagonal = (j - i[:, None] + longest - 1).flatten()
        variance.index_add_(1, diagonal, (cell + row**2).sum(0).flatten(1))
    return (variance + _rounding(exact, torch.float32) ** 2).sqrt()
