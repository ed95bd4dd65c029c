"""The public functions on the CPU backend: layouts, merging, prefixes, explain()."""

from __future__ import annotations

import math

import oracle
import pytest
import torch

import fastattn
from fastattn import philox
from fastattn.errors import InvalidArgumentError

pytestmark = pytest.mark.usefixtures("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors(*shapes, dtype=torch.float32):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def test_results_lie_in_memory_as_the_inputs_do():
    """A (B, N, H, D) projection's output goes back to (B, N, H * D) without a copy, gradients too."""
    qkv = torch.randn(2, 9, 3, 4, 16)
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in qkv.unbind(2))
    out = fastattn.attention(q, k, v)
    assert out.transpose(1, 2).is_contiguous()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert gradient.transpose(1, 2).is_contiguous()
    narrow = fastattn.attention(q, k, v[..., :8])
    assert narrow.transpose(1, 2).is_contiguous()
    assert fastattn.attention(*(x.contiguous() for x in (q, k, v))).is_contiguous()


def test_upstream_gradients_of_any_strides():
    q, k, v = tensors((2, 3, 7, 16), (2, 3, 7, 16), (2, 3, 7, 16))
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    dout, dlse = torch.randn(16, 7, 3, 2).permute(3, 2, 1, 0), torch.randn(7, 3, 2).permute(2, 1, 0)
    expected = torch.autograd.grad(
        (out, lse), (q, k, v), (dout.contiguous(), dlse.contiguous()), retain_graph=True
    )
    actual = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse), retain_graph=True)
    expanded = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    ones = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    only_lse = torch.autograd.grad(lse, (q, k), dlse)
    zeros = torch.autograd.grad(
        fastattn.attention(q, k, v, return_lse=True), (q, k), (torch.zeros_like(out), dlse)
    )
    for x, y in ((actual, expected), (expanded, ones), (only_lse, zeros)):
        assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("shape", [(9, 11), (4, 9, 11), (1, 1, 1, 11), (2, 1, 9, 1)], ids=str)
def test_a_bias_gets_a_gradient_of_its_own_shape_and_dtype(shape):
    q, k, v, bias = tensors((2, 4, 9, 16), (2, 4, 11, 16), (2, 4, 11, 16), shape, dtype=torch.bfloat16)
    (gradient,) = torch.autograd.grad(fastattn.attention(q, k, v, bias=bias).sum(), bias)
    assert gradient.shape == bias.shape
    assert gradient.dtype == bias.dtype


def test_packed_lengths_are_computed_when_absent():
    q, k = torch.randn(9, 2, 16), torch.randn(12, 2, 16)
    starts_q, starts_k = (torch.tensor(x, dtype=torch.int32) for x in ([0, 4, 9], [0, 9, 12]))
    computed = fastattn.varlen_attention(q, k, k, starts_q, starts_k, causal=True)
    given = fastattn.varlen_attention(
        q, k, k, starts_q, starts_k, causal=True, max_seqlen_q=5, max_seqlen_k=9
    )
    generous = fastattn.varlen_attention(
        q, k, k, starts_q, starts_k, causal=True, max_seqlen_q=50, max_seqlen_k=90
    )
    assert torch.equal(computed, given)
    assert torch.equal(computed, generous)
    no_sequence = fastattn.varlen_attention(q[:0], k[:0], k[:0], torch.zeros(1, dtype=torch.int32))
    assert no_sequence.shape == (0, 2, 16)


def over_both(q, k, v, prefix_k, prefix_v, key_mask, *, causal=False, window=(None, None), **options):
    """prefix_attention by its words: one softmax over both, and a mask of dropout for each."""
    batch, heads, rows, _ = q.shape
    prefix, keys = prefix_k.shape[2], k.shape[2]
    both_k, both_v = (
        torch.cat([p.expand(batch, -1, -1, -1), x], dim=2) for p, x in ((prefix_k, k), (prefix_v, v))
    )
    position, j = torch.arange(rows)[:, None] + keys - rows, torch.arange(keys)
    left, right = (keys + rows if side is None else side for side in window)
    visible = (j >= position - left) & (j <= position + (0 if causal else right))
    visible = torch.cat([torch.ones(rows, prefix, dtype=torch.bool), visible], dim=1)
    visible = (
        visible & torch.cat([torch.ones(batch, prefix, dtype=torch.bool), key_mask], dim=1)[:, None, None]
    )
    hidden = torch.zeros(visible.shape, dtype=q.dtype).masked_fill(~visible, -math.inf)
    p, seed = options.pop("dropout_p", 0.0), torch.tensor(options.pop("seed", 0))
    one_hot = torch.eye(prefix + keys, dtype=q.dtype).expand(batch, k.shape[1], -1, -1)
    weights, lse = fastattn.attention(
        q, both_k, one_hot, bias=hidden, return_lse=True, backend="reference", **options
    )
    shape = {"num_heads": heads, "seqlen_k": prefix}
    of_prefix = philox.keep_mask(seed + 1, p, batch=1, seqlen_q=batch * rows, **shape)
    of_prefix = of_prefix.view(heads, batch, rows, prefix).transpose(0, 1)
    of_own = philox.keep_mask(seed, p, batch=batch, num_heads=heads, seqlen_q=rows, seqlen_k=keys)
    kept = torch.cat([of_prefix, of_own], dim=3).to(q.dtype) * philox.keep_scale(p)
    return (weights * kept) @ both_v.repeat_interleave(heads // k.shape[1], dim=1), lse


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"softcap": 2.0, "scale": 0.4},
        {"window": (3, 1)},
        {"dropout_p": 0.3, "seed": 2**40 + 7},
        {"causal": True, "window": (4, None), "dropout_p": 0.1, "seed": 1},
    ],
    ids="+".join,
)
@pytest.mark.parametrize("prefix_length", [1, 33])
def test_prefix_attention_is_attention_over_both(dtype, options, prefix_length):
    """Twice PyTorch's error and a rounding or two more: the parts are rounded before they merge."""
    shapes = (
        (3, 4, 10, 16),
        (3, 2, 12, 16),
        (3, 2, 12, 24),
        (1, 2, prefix_length, 16),
        (1, 2, prefix_length, 24),
    )
    ours = tensors(*shapes, dtype=dtype)
    key_mask = torch.rand(3, 12) > 0.3
    out, lse = fastattn.prefix_attention(*ours, key_mask=key_mask, return_lse=True, **options)
    upstream = torch.randn(out.shape).to(dtype), torch.randn(lse.shape)

    def results(inputs, out, lse):
        pairs = zip((out, lse), upstream, strict=True)
        gradients = torch.autograd.grad((out, lse), inputs, [x.to(of.dtype) for of, x in pairs])
        return [x.detach().double() for x in (out, lse, *gradients)]

    def by_words(in_dtype):
        inputs = [x.detach().to(in_dtype).requires_grad_() for x in ours]
        with oracle.computing_in(in_dtype):
            return results(inputs, *over_both(*inputs, key_mask, **options))

    names = ("out", "lse", "dq", "dk", "dv", "dprefix_k", "dprefix_v")
    for name, found, exact, plain in zip(
        names, results(ours, out, lse), by_words(torch.float64), by_words(dtype), strict=True
    ):
        error, of_plain = (found - exact).abs(), (plain - exact).abs() * (name != "lse")
        eps = torch.finfo(torch.float32 if name == "lse" else dtype).eps
        assert error.max() <= 2 * of_plain.max() + 2 * eps * exact.abs().max(), name
        rms, of_plain, of_exact = (float(x.square().mean().sqrt()) for x in (error, of_plain, exact))
        assert rms <= 2 * of_plain + eps * of_exact, name


def test_prefix_where_own_keys_are_all_masked():
    q, k, v, prefix_k, prefix_v = tensors(*((2, 2, 5, 8),) * 3, *((1, 2, 4, 8),) * 2)
    hidden = torch.zeros(2, 5, dtype=torch.bool)
    out = fastattn.prefix_attention(q, k, v, prefix_k, prefix_v, key_mask=hidden)
    alone = fastattn.attention(q, *(x.expand(2, -1, -1, -1) for x in (prefix_k, prefix_v)))
    torch.testing.assert_close(out, alone)
    nothing = torch.empty(1, 2, 0, 8)
    out, lse = fastattn.prefix_attention(q, k, v, nothing, nothing, key_mask=hidden, return_lse=True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_prefix_gets_gradients_alone():
    q, k, v, prefix_k, prefix_v = tensors(*((2, 2, 5, 8),) * 3, *((1, 2, 4, 8),) * 2)
    frozen = [x.detach() for x in (q, k, v)]
    out = fastattn.prefix_attention(*frozen, prefix_k, prefix_v)
    assert all(g.shape == (1, 2, 4, 8) for g in torch.autograd.grad(out.sum(), (prefix_k, prefix_v)))


def test_prefix_of_a_batch_is_refused():
    q, k, v = tensors(*((2, 2, 5, 8),) * 3)
    with pytest.raises(InvalidArgumentError, match="prefix_k"):
        fastattn.prefix_attention(q, k, v, k, v)


def test_explain_names_the_kernel_and_who_was_refused(cpu):
    q = torch.randn(1, 2, 8, 16)
    explanation = fastattn.explain(q, q, q)
    assert (explanation.backend, explanation.kernel) == ("cpu", cpu.isa())
    assert set(explanation.refused) == {"cuda", "triton"}
    assert cpu.isa() in str(explanation)
    wide = fastattn.explain(q.double(), q.double(), q.double())
    assert wide.backend is None
    assert "float64" in wide.refused["cpu"]
    assert fastattn.explain(q, q, q, backend="reference").backend == "reference"


def test_tensors_as_options_are_no_keys():
    """Options are remembered by value: one that compares by identity must not be."""
    q = torch.randn(1, 2, 8, 16)
    for _ in range(2):
        with pytest.raises(InvalidArgumentError, match="scale"):
            fastattn.attention(q, q, q, scale=torch.tensor(0.5))
    assert torch.equal(fastattn.attention(q, q, q, window=[3, 3]), fastattn.attention(q, q, q, window=(3, 3)))
