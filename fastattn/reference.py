"""The oracle: attention as the equations say it, in plain PyTorch, for any dtype including float64.

    s = softcap(scale * q k^T) + bias + relative_bias + alibi        (-inf where a key is not visible)
    lse = log sum_j exp(s_j)            out = dropout(exp(s - lse)) v

It stores the whole (Nq, Nk) matrix, is differentiable by plain autograd, and is what every kernel is tested
against.
Nothing falls back to it: it runs only when a caller asks for `backend="reference"`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import philox
from .problem import AttentionInputs, AttentionProblem, check_offsets


def attention(
    problem: AttentionProblem, inputs: AttentionInputs, compute_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a validated problem, in the problem's layout; out in q's dtype, lse in `compute_dtype`.

    compute_dtype: what the arithmetic is done in; float32, or float64 for float64 inputs, when None.
    """
    if compute_dtype is None:
        compute_dtype = torch.float64 if problem.dtype == torch.float64 else torch.float32
    if problem.packed:
        out, lse = _packed(problem, inputs, compute_dtype)
    else:
        batch_index = torch.arange(problem.batch)
        out, lse = _padded(problem, inputs, batch_index, problem.seqlen_q - 1, compute_dtype)
    return out.to(problem.dtype), lse


def _packed(
    problem: AttentionProblem, inputs: AttentionInputs, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One sequence at a time through `_padded`, as a batch of one."""
    starts_q = check_offsets("cu_seqlens_q", inputs.cu_seqlens_q, problem.total_q, problem.seqlen_q)
    starts_k = check_offsets("cu_seqlens_k", inputs.cu_seqlens_k, problem.total_k, problem.seqlen_k)
    outs, lses = [], []

    def rows_without_sequence(count: int) -> None:
        outs.append(inputs.q.new_zeros((count, problem.num_heads, problem.head_dim_v), dtype=compute_dtype))
        lses.append(inputs.q.new_full((problem.num_heads, count), -math.inf, dtype=compute_dtype))

    rows_without_sequence(starts_q[0])
    for b in range(problem.batch):
        rows_q, rows_k = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        seqlen_q, seqlen_k = rows_q.stop - rows_q.start, rows_k.stop - rows_k.start
        bias = inputs.bias
        if bias is not None:
            bias = bias[b : b + 1] if bias.shape[0] > 1 else bias
            bias = bias[:, :, :seqlen_q] if bias.shape[2] > 1 else bias
            bias = bias[:, :, :, :seqlen_k] if bias.shape[3] > 1 else bias
        slopes = inputs.alibi_slopes
        one = AttentionInputs(
            q=inputs.q[rows_q].transpose(0, 1)[None],
            k=inputs.k[rows_k].transpose(0, 1)[None],
            v=inputs.v[rows_k].transpose(0, 1)[None],
            bias=bias,
            relative_bias=inputs.relative_bias,
            alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[b : b + 1],
            seed=inputs.seed,
        )
        out, lse = _padded(problem, one, torch.tensor([b]), problem.seqlen_q - 1, compute_dtype)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    rows_without_sequence(problem.total_q - starts_q[-1])
    return torch.cat(outs), torch.cat(lses, dim=1)


def _padded(
    problem: AttentionProblem,
    inputs: AttentionInputs,
    batch_index: Tensor,
    diagonal: int,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Attention of (B, H, N, D) tensors whose own shapes count, not the problem's.

    batch_index: which sequence of the batch each is, for dropout. diagonal: the column of relative_bias for j
        = i.
    """
    group = problem.num_heads // problem.num_kv_heads
    q = inputs.q.to(compute_dtype)
    k = inputs.k.to(compute_dtype).repeat_interleave(group, dim=1)
    v = inputs.v.to(compute_dtype).repeat_interleave(group, dim=1)
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    i = torch.arange(seqlen_q, device=q.device)[:, None]
    j = torch.arange(seqlen_k, device=q.device)[None, :]

    visible = _visible(problem, inputs.key_mask, i, j, seqlen_k - seqlen_q)
    # 0 * NaN is NaN, so what lies in keys that no query sees is cleared before it meets a zero weight.
    hidden_keys = ~visible.any(dim=2)[..., None]
    k, v = k.masked_fill(hidden_keys, 0.0), v.masked_fill(hidden_keys, 0.0)

    scores = q @ k.transpose(2, 3) * problem.softmax_scale
    if problem.softcap > 0.0:
        scores = problem.softcap * torch.tanh(scores / problem.softcap)
    if inputs.bias is not None:
        scores = scores + inputs.bias.to(compute_dtype)
    if inputs.relative_bias is not None:
        scores = scores + inputs.relative_bias.to(compute_dtype)[:, j - i + diagonal]
    if inputs.alibi_slopes is not None:
        slopes = inputs.alibi_slopes.to(compute_dtype)
        slopes = slopes[..., None, None] if slopes.dim() == 2 else slopes[None, :, None, None]
        scores = scores - slopes * (i + seqlen_k - seqlen_q - j).abs()
    scores = scores.masked_fill(~visible, -math.inf)

    weights, lse = _softmax(scores)
    if problem.dropout_p > 0.0:
        keep = philox.keep_mask(
            inputs.seed,
            problem.dropout_p,
            batch=batch_index,
            num_heads=problem.num_heads,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            device=q.device,
        )
        weights = weights * keep * philox.keep_scale(problem.dropout_p)
    return weights @ v, lse


def rotary(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool = False) -> Tensor:
    """fastattn.rotary of one (B, H, N, D) by angles (B | 1, N, D_rot), in the dtype torch promotes to."""
    half = cos.shape[-1] // 2
    cos, sin = cos[:, None], sin[:, None]
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    if transposed:
        sin = -sin.roll(half, -1)
    low, high = low * cos[..., :half] - high * sin[..., :half], high * cos[..., half:] + low * sin[..., half:]
    return torch.cat((low, high, rest.to(low.dtype)), -1)


def _visible(problem: AttentionProblem, key_mask: Tensor | None, i: Tensor, j: Tensor, shift: int) -> Tensor:
    """(B|1, 1, Nq, Nk) bool: which keys a query sees. `shift` aligns the last query with the last key."""
    visible = torch.ones(i.shape[0], j.shape[1], dtype=torch.bool, device=i.device)
    if problem.causal:
        visible = visible & (j <= i + shift)
    if problem.window_left >= 0:
        visible = visible & (j >= i + shift - problem.window_left)
    if problem.window_right >= 0:
        visible = visible & (j <= i + shift + problem.window_right)
    visible = visible[None, None]
    return visible if key_mask is None else visible & key_mask[:, None, None, :]


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp of the last dimension; a row of -inf alone gives zeros and -inf."""
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], -math.inf)
    peak = scores.detach().amax(dim=-1, keepdim=True)
    peak = torch.where(peak == -math.inf, 0.0, peak)
    weights = torch.exp(scores - peak)
    total = weights.sum(dim=-1, keepdim=True)
    empty = total == 0.0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -math.inf, peak + total.log())
    return weights / total, lse[..., 0]
