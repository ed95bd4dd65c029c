"""What the kernels promise beyond right numbers: nothing is silently wrong, nothing is left unwritten."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from oracle import Case, check, run, upstream_of
from simulated import VARIANTS

import fastattn

HALF = {"dtype": torch.float16, "kv_heads": 1, "head_dim": 64, "head_dim_v": 64}
DEVICES = pytest.mark.parametrize("capability", [80, 90])


def attend(q, k, v, **options):
    return fastattn.attention(q, k, v, backend="cpu", **options)


@DEVICES
def test_far_rows_are_counted_in_64_bits(simulate, capability):
    """Rows 2**26 elements apart: the 33rd is beyond 32 bits. Only the pages touched take memory."""
    simulate("64", "f16", "plain", capability)
    rows, stride = 35, 2**26
    storage = torch.empty((rows - 1) * stride + 64, dtype=torch.float16)
    far = storage.as_strided((1, 1, rows, 64), (0, 0, stride, 1)).copy_(torch.randn(1, 1, rows, 64))
    near = far.contiguous()
    results = []
    for x in (near, far):
        x = x.detach().requires_grad_()
        out = attend(x, x, x, causal=True)
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@DEVICES
def test_packed_rows_without_a_sequence_are_cleared(simulate, capability):
    simulate("64", "f16", "plain", capability)
    q, k, v = (torch.randn(60, 2, 64).half().requires_grad_() for _ in range(3))
    offsets = torch.tensor([3, 20, 41], dtype=torch.int32)
    out, lse = fastattn.varlen_attention(q, k, v, offsets, max_seqlen_q=21, return_lse=True, backend="cpu")
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    loose = torch.ones(60, dtype=torch.bool)
    loose[3:41] = False
    assert (lse[:, loose] == -math.inf).all()
    assert lse[:, ~loose].isfinite().all()
    for x in (out, *gradients):
        assert not x[loose].any()
        assert (x[~loose] != 0).any(-1).all()


@DEVICES
@pytest.mark.parametrize(
    ("longest_q", "longest_k"),
    [(40, 70), pytest.param(70, 40, marks=pytest.mark.slow)],
    ids=["queries", "keys"],
)
def test_understated_max_seqlen_gives_nan(simulate, capability, longest_q, longest_k):
    """The offsets stay on the device, so the kernels have to be loud; other sequences are none the worse."""
    simulate("64", "f16", "plain", capability)
    x = torch.randn(90, 2, 64).half().requires_grad_()
    q, k, v = x[:, :1], x[:, 1:], x[:, :1] + x[:, 1:]
    offsets = torch.tensor([0, 10, 80, 90], dtype=torch.int32)
    results = []
    for q_length, k_length in ((70, 70), (longest_q, longest_k)):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out, lse = fastattn.varlen_attention(
            *leaves, offsets, max_seqlen_q=q_length, max_seqlen_k=k_length, return_lse=True, backend="cpu"
        )
        gradients = torch.autograd.grad(out.square().sum(), leaves)
        results.append((out, lse.T, *gradients))
    for right, found in zip(*results, strict=True):
        assert found[10:80].isnan().all()
        assert not found[10:80].signbit().any()  # as bytes are that nobody wrote
        for rows in (slice(0, 10), slice(80, 90)):
            torch.testing.assert_close(found[rows], right[rows], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_understated_max_seqlen_spoils_gradients_of_biases(simulate, dtype):
    """They sum over all sequences, so nothing of them can be trusted."""
    simulate("32", "f16" if dtype == torch.float16 else "f32", VARIANTS)
    x = torch.randn(40, 1, 32).to(dtype)
    offsets = torch.tensor([0, 20, 40], dtype=torch.int32)
    bias = torch.zeros(1, 1, 20, 10, dtype=dtype, requires_grad=True)
    relative = torch.zeros(1, 29, requires_grad=True)
    options = {"max_seqlen_q": 20, "max_seqlen_k": 10, "backend": "cpu"}
    out = fastattn.varlen_attention(x, x, x, offsets, offsets, bias=bias, relative_bias=relative, **options)
    assert out.isnan().all()
    found = torch.autograd.grad(out.sum(), (bias, relative))
    assert all(gradient.isnan().all() for gradient in found)


@DEVICES
def test_seed_on_the_device(simulate, monkeypatch, capability):
    """Read by the kernels, where it is: the same mask as of a seed on the host."""
    device = simulate("32", "f16", VARIANTS, capability)
    options = {"dropout_p": 0.3, "seed": 2**63 + 5}
    case = Case(**{**HALF, "head_dim": 32, "head_dim_v": 32}, lengths=((20, 40),), options=options)
    tensors = case.tensors()
    upstream = upstream_of(case, tensors)
    host = run(case, tensors, upstream, backend="cpu")
    other = run(replace(case, options={**options, "seed": 6}), tensors, upstream, backend="cpu")
    assert not torch.equal(host["out"], other["out"])
    monkeypatch.setattr(device, "seed_on_device", True)
    found = run(case, tensors, upstream, backend="cpu")
    assert all(torch.equal(found[name], host[name]) for name in host)
    check(replace(case, options={**options, "seed": torch.tensor(7)}))


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_prefix(simulate, dtype):
    """A prefix shared by the batch, in front of each sequence's own keys: as if they were one."""
    simulate("64", "f16" if dtype == torch.float16 else "bf16", "plain")
    shapes = ((3, 2, 9, 64), *[(3, 1, 20, 64)] * 2, *[(1, 1, 70, 64)] * 2)
    drawn = [torch.randn(shape).to(dtype) for shape in shapes]
    upstream = torch.randn(3, 2, 9, 64).to(dtype)
    mask = torch.rand(3, 20) < 0.7

    def joined(q, k, v, prefix_k, prefix_v):
        both = [torch.cat((p.expand(3, -1, -1, -1), x), 2) for p, x in ((prefix_k, k), (prefix_v, v))]
        all_mask = torch.cat((torch.ones(3, 70, dtype=torch.bool), mask), 1)
        return fastattn.attention(q, *both, key_mask=all_mask, causal=True, backend="reference")

    def shared(*tensors):
        return fastattn.prefix_attention(*tensors, key_mask=mask, causal=True, backend="cpu")

    def results(function, of):
        leaves = [x.to(of).requires_grad_() for x in drawn]
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, upstream.to(of))

    names = ("out", "dq", "dk", "dv", "dprefix_k", "dprefix_v")
    exact, plain, ours = results(joined, torch.float64), results(joined, dtype), results(shared, dtype)
    for name, right, with_torch, found in zip(names, exact, plain, ours, strict=True):
        floor = 4.0 * torch.finfo(dtype).eps * right.detach().abs().max()
        error, of_torch = ((x.detach() - right.detach()).abs().max() for x in (found, with_torch))
        assert error <= 2.0 * of_torch + floor, name


def test_no_order_but_the_program_s(simulate):
    """The same call twice gives the same bits: no kernel adds up with atomics or waits for another block."""
    text = simulate("64", "f16", "plain").text() + simulate("32", "f16", VARIANTS).text()
    for kernel in ("sm907forward", "7forward", "12key_gradient", "14score_gradient", "combine", "fill_rest"):
        assert kernel in text
    orderless = r"^\s*(@\S+\s+)?(atom|red|multimem|cp\.reduce|ld\.(acquire|relaxed|volatile))\b.*"
    assert not re.findall(orderless, text, re.M)
