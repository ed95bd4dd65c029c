"""I5: which weights are dropped is a function of (seed, b, h, i, j) alone."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn import philox

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kept_by_attention(dropout_p, seed, shape, *, dtype=torch.float32, group=1):
    """The mask read off attention itself: equal weights, and values that are unit vectors."""
    batch, heads, seqlen_q, seqlen_k = shape
    q, k = (
        torch.zeros(batch, heads, seqlen_q, 16, dtype=dtype),
        torch.zeros(batch, heads // group, seqlen_k, 16, dtype=dtype),
    )
    kept = []
    for start in range(0, seqlen_k, 256):
        block = torch.eye(seqlen_k, dtype=dtype)[:, start : start + 256]
        v = block.expand(batch, heads // group, *block.shape)
        kept.append(fastattn.attention(q, k, v, dropout_p=dropout_p, seed=seed, backend="cpu") > 0)
    return torch.cat(kept, dim=-1)


@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 + 12345, 2**64 - 1])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.93])
def test_the_library_draws_what_the_text_says(cpu, seed, dropout_p):
    shape = (2, 3, 37, 301)
    signed = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
    expected = philox.keep_mask(signed, dropout_p, batch=2, num_heads=3, seqlen_q=37, seqlen_k=301)
    assert torch.equal(cpu.dropout_mask(seed, dropout_p, shape), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 2])
def test_attention_drops_just_these(cpu, dtype, group):
    shape = (2, 4, 67, 141)
    expected = philox.keep_mask(torch.tensor(9), 0.4, batch=2, num_heads=4, seqlen_q=67, seqlen_k=141)
    assert torch.equal(kept_by_attention(0.4, 9, shape, dtype=dtype, group=group), expected)


def test_neither_length_nor_layout_nor_masks_matter(cpu):
    q, k, v = (torch.randn(2, 2, n, 16) for n in (40, 150, 150))
    visible = torch.ones(2, 150, dtype=torch.bool)
    visible[:, 90:] = False
    masked = fastattn.attention(q, k, v, key_mask=visible, dropout_p=0.5, seed=3, backend="cpu")
    cut = fastattn.attention(q, k[:, :, :90], v[:, :, :90], dropout_p=0.5, seed=3, backend="cpu")
    torch.testing.assert_close(masked, cut)
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    starts_q, starts_k = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (40, 150))
    packed = fastattn.varlen_attention(*rows, starts_q, starts_k, dropout_p=0.5, seed=3, backend="cpu")
    padded = fastattn.attention(q, k, v, dropout_p=0.5, seed=3, backend="cpu")
    torch.testing.assert_close(packed, padded.transpose(1, 2).flatten(0, 1))


def test_its_share_and_its_expectation():
    kept = philox.keep_mask(torch.tensor(5), 0.3, batch=2, num_heads=4, seqlen_q=256, seqlen_k=256).double()
    deviation = (0.3 * 0.7 / kept.numel()) ** 0.5
    assert abs(kept.mean() - 0.7) < 5 * deviation
    assert abs((kept * philox.keep_scale(0.3)).mean() - 1.0) < 5 * deviation / 0.7
    for axis in range(4):  # neighbours along every axis are independent
        x, y = kept.narrow(axis, 0, kept.shape[axis] - 1), kept.narrow(axis, 1, kept.shape[axis] - 1)
        correlation = torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1]
        assert abs(correlation) < 5 / x.numel() ** 0.5


def test_seeds(cpu):
    q = torch.randn(1, 2, 30, 16)

    def out(seed=None):
        return fastattn.attention(q, q, q, dropout_p=0.5, seed=seed, backend="cpu")

    assert torch.equal(out(5), out(torch.tensor(5)))
    assert not torch.equal(out(5), out(6))
    torch.manual_seed(0)
    first, second = out(), out()
    torch.manual_seed(0)
    assert torch.equal(out(), first)
    assert not torch.equal(first, second)


def test_backward_replays_the_forward_mask(cpu):
    """dv of one weight alone is that weight after dropout."""
    q, k, v = (torch.randn(1, 1, 50, 16, requires_grad=True) for _ in range(3))
    dv = torch.zeros(50, 50)
    out = fastattn.attention(q, k, v, dropout_p=0.5, seed=8, backend="cpu")
    for i in range(50):
        upstream = torch.zeros_like(out)
        upstream[0, 0, i, 0] = 1.0
        dv[i] = torch.autograd.grad(out, v, upstream, retain_graph=True)[0][0, 0, :, 0]
    kept = philox.keep_mask(torch.tensor(8), 0.5, batch=1, num_heads=1, seqlen_q=50, seqlen_k=50)
    assert torch.equal(dv > 0, kept[0, 0])
