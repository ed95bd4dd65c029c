"""I2: a row that sees nothing gives 0, lse -inf and zero gradients; what lies under a mask never leaks."""

from __future__ import annotations

import math

import pytest
import torch

import fastattn

pytestmark = pytest.mark.usefixtures("cpu", "poisoned")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GARBAGE = (math.nan, math.inf, -math.inf)


def forward_and_backward(q, k, v, **options):
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = fastattn.attention(*inputs, **options, return_lse=True, backend="cpu")
    gradients = torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), torch.ones_like(lse)))
    return out.detach(), lse.detach(), gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seqlen_k", [5, 40, 130])
def test_a_sequence_masked_altogether(dtype, seqlen_k):
    q, k, v = (torch.randn(2, 2, n, 16).to(dtype) for n in (33, seqlen_k, seqlen_k))
    key_mask = torch.ones(2, seqlen_k, dtype=torch.bool)
    key_mask[1] = False
    out, lse, gradients = forward_and_backward(q, k, v, key_mask=key_mask)
    assert (out[1] == 0).all()
    assert (lse[1] == -math.inf).all()
    assert all((gradient[1] == 0).all() and gradient.isfinite().all() for gradient in gradients)
    assert out[0].isfinite().all()
    assert (out[0] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_first_rows_of_causal_attention_with_more_queries_than_keys(dtype):
    q, k, v = (torch.randn(1, 2, n, 16).to(dtype) for n in (50, 20, 20))
    out, lse, (dq, _, _) = forward_and_backward(q, k, v, causal=True)
    assert (out[:, :, :30] == 0).all()
    assert (dq[:, :, :30] == 0).all()
    assert (lse[:, :, :30] == -math.inf).all()
    assert lse[:, :, 30:].isfinite().all()


def test_rows_hidden_by_a_bias_of_minus_infinity():
    q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))
    bias = torch.zeros(20, 20)
    bias[3] = -math.inf
    bias.requires_grad_()
    out, lse, gradients = forward_and_backward(q, k, v, bias=bias)
    assert (out[:, :, 3] == 0).all()
    assert (lse[:, :, 3] == -math.inf).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("pattern", ["right", "left", "holes"])
def test_garbage_under_key_mask(dtype, garbage, pattern):
    q, k, v = (torch.randn(2, 2, n, 24).to(dtype) for n in (37, 75, 75))
    key_mask = torch.ones(2, 75, dtype=torch.bool)
    hidden = {"right": slice(41, None), "left": slice(0, 34), "holes": slice(0, None, 3)}[pattern]
    key_mask[:, hidden] = False
    clean = forward_and_backward(q, k, v, key_mask=key_mask, causal=True)
    k[:, :, hidden], v[:, :, hidden] = garbage, garbage
    dirty = forward_and_backward(q, k, v, key_mask=key_mask, causal=True)
    for x, y in zip((*dirty[:2], *dirty[2]), (*clean[:2], *clean[2]), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("spoilt", ["k", "v"])
@pytest.mark.parametrize(
    ("rows", "keys", "at", "options"),
    [
        (150, 150, 70, {"causal": True}),
        (150, 150, 70, {"window": (20, 3)}),
        (90, 600, 520, {"causal": True}),
        (90, 600, 300, {"window": (230, 10)}),
        (6, 600, 597, {"causal": True}),
        (6, 600, 300, {"window": (296, None)}),
    ],
    ids=str,
)
def test_garbage_in_a_key_that_some_rows_see(dtype, garbage, spoilt, rows, keys, at, options):
    """Rows that don't see it are as without it, and so are the keys that none of the spoilt rows sees."""
    q, k, v = (torch.randn(1, 2, n, 24).to(dtype) for n in (rows, keys, keys))
    mask = torch.rand(1, keys) > 0.2
    mask[0, at] = True
    clean = forward_and_backward(q, k, v, key_mask=mask, **options)
    {"k": k, "v": v}[spoilt][:, :, at] = garbage
    out, lse, (dq, dk, dv) = forward_and_backward(q, k, v, key_mask=mask, **options)
    i, j = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)
    left, right = options.get("window", (None, 0))
    visible = (j >= i - (keys if left is None else left)) & (j <= i + (keys if right is None else right))
    others = ~visible[:, at]
    assert others.any()
    assert not others.all()
    apart = ~visible[~others].any(0)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    for dirty, expected in zip((out, lse, dq), (*clean[:2], clean[2][0]), strict=True):
        torch.testing.assert_close(dirty[:, :, others], expected[:, :, others], **tolerance)
    for dirty, expected in zip((dk, dv), clean[2][1:], strict=True):
        torch.testing.assert_close(dirty[:, :, apart], expected[:, :, apart], **tolerance)
    if spoilt == "v":
        assert not out[:, :, ~others].isfinite().all(-1).any()
        torch.testing.assert_close(lse, clean[1])


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_in_a_neighbouring_packed_sequence(garbage):
    q = torch.randn(60, 2, 16)
    offsets = torch.tensor([0, 17, 40, 60], dtype=torch.int32)
    clean = fastattn.varlen_attention(q, q, q, offsets, backend="cpu")
    q[17:40] = garbage
    dirty = fastattn.varlen_attention(q, q, q, offsets, backend="cpu")
    assert torch.equal(dirty[:17], clean[:17])
    assert torch.equal(dirty[40:], clean[40:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_sequences_and_rows_of_none(dtype):
    """Sequences without queries, without keys, without either, and rows behind the last offset."""
    starts_q = torch.tensor([0, 0, 5, 9, 9], dtype=torch.int32)
    starts_k = torch.tensor([0, 4, 4, 11, 11], dtype=torch.int32)
    q, k, v = (torch.randn(n, 2, 16).to(dtype).requires_grad_() for n in (12, 13, 13))
    out, lse = fastattn.varlen_attention(q, k, v, starts_q, starts_k, return_lse=True, backend="cpu")
    for rows in (slice(0, 5), slice(9, 12)):
        assert (out[rows] == 0).all()
        assert (lse[:, rows] == -math.inf).all()
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert (dq[:5] == 0).all()
    assert (dq[9:] == 0).all()
    for gradient in (dk, dv):
        assert (gradient[:4] == 0).all()
        assert (gradient[11:] == 0).all()
    assert (dv[4:11] != 0).all()


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0)], ids=str)
def test_nothing_at_all(shape):
    batch, seqlen_q, seqlen_k = shape
    q, k, v = (torch.randn(batch, 2, n, 16) for n in (seqlen_q, seqlen_k, seqlen_k))
    out, lse, gradients = forward_and_backward(q, k, v)
    assert out.shape == (batch, 2, seqlen_q, 16)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    assert all((gradient == 0).all() for gradient in gradients)
