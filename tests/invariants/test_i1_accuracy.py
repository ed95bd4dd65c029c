"""I1: at most twice as far from the float64 reference as PyTorch in the same dtype is, plus a floor."""

from __future__ import annotations

import math
from dataclasses import replace

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from oracle import Case

import fastattn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=oracle.cases())
def test_any_combination_of_features(cpu, poisoned, case):
    torch.manual_seed(0)
    oracle.check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128, 256])
def test_every_tuned_head_dim(cpu, poisoned, dtype, head_dim):
    case = Case(dtype=dtype, lengths=((66, 129),), kv_heads=1, head_dim=head_dim, head_dim_v=head_dim)
    oracle.check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (100, 0)}], ids=str)
def test_long_sequences(cpu, poisoned, dtype, options):
    oracle.check(Case(dtype=dtype, lengths=((550, 600),), kv_heads=1, head_dim=64, options=options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_one_query(cpu, poisoned, dtype):
    case = Case(dtype=dtype, lengths=((1, 1500),) * 2, kv_heads=2, group=3, head_dim=64, head_dim_v=64)
    oracle.check(case)


# Shapes by which csrc/cpu/api.cpp divides work differently; each has several key tiles.
_FEATURES = {"bias": (False, True, True, True), "alibi": "heads", "mask": 0.3}
DIVISIONS = {
    "a unit a head, and its own sums of dq": Case(lengths=((70, 300),) * 8, kv_heads=8),
    "few long heads, and sums of dq of their own": Case(
        lengths=((800, 260),), kv_heads=8, head_dim=256, head_dim_v=16, wanted=("q", "k")
    ),
    "dq in a pass of its own": Case(
        lengths=((800, 260),), kv_heads=1, group=8, head_dim=256, head_dim_v=16, wanted=("q", "k")
    ),
    "units of three query tiles": Case(
        lengths=((130, 270),) * 8, kv_heads=16, wanted=("q",), options={"causal": True}
    ),
    "units of eight query tiles, by four heads": Case(
        lengths=((65, 270),) * 8, kv_heads=8, group=4, wanted=(), options={"window": (100, None)}, mask=0.3
    ),
    "key tiles that take turns": Case(
        lengths=((130, 700),), group=2, head_dim=64, head_dim_v=80, use_lse=True, **_FEATURES
    ),
    "packed key tiles that take turns": Case(
        lengths=((130, 257), (3, 513), (70, 0), (1, 40)), packed=True, group=2, head_dim=64, head_dim_v=64,
        options={"causal": True, "dropout_p": 0.2, "seed": 9},
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", DIVISIONS.values(), ids=DIVISIONS.keys())
def test_every_division_of_the_work(cpu, poisoned, dtype, case):
    oracle.check(replace(case, dtype=dtype))


@pytest.mark.parametrize("magnitude", [1e-30, 1e3])
def test_scores_far_from_one(cpu, poisoned, magnitude):
    """Softmax of all but equal scores, and of scores of which one wins: nothing overflows."""
    case = Case(lengths=((33, 77),), options={"scale": magnitude}, head_dim=24)
    ours = oracle.check(case)
    assert all(result.isfinite().all() for result in ours.values())


@pytest.mark.parametrize("rows", [1, 4, 8, 9, 70])
@pytest.mark.parametrize("seqlen_k", [40, 700])
def test_backward_recomputes_the_weights_of_forward(cpu, poisoned, rows, seqlen_k):
    """With ones upstream, dv sums over the keys to the number of queries: every row's weights sum to 1.

    Scores are of 50s summed from 256 terms, so weights recomputed from scores summed in another order than
    forward's would be off by their rounding, some 1e-5.
    """
    q, k = torch.randn(2, 3, rows, 256) * 2.4, torch.randn(2, 3, seqlen_k, 256) * 2.4
    v = torch.randn(2, 3, seqlen_k, 32, requires_grad=True)
    out = fastattn.attention(q, k, v, backend="cpu")
    (dv,) = torch.autograd.grad(out, v, torch.ones_like(out))
    error = (dv.double().sum(2) / rows - 1).abs().max()
    assert error < 1.5e-6


@pytest.mark.parametrize("rows", [2, 40])
def test_one_score_that_wins_by_far(cpu, poisoned, rows):
    """Scores of 1e30: every row is one key's value, and q and k get rounding errors times scale."""
    q, k, v = (torch.randn(1, 2, n, 16, requires_grad=True) for n in (rows, 300, 300))
    out, lse = fastattn.attention(q, k, v, scale=1e30, return_lse=True, backend="cpu")
    scores = (q.double() @ k.double().transpose(-1, -2)).detach() * 1e30
    winner = scores.argmax(-1, keepdim=True)
    torch.testing.assert_close(out, v.gather(2, winner.expand(-1, -1, -1, 16)))
    torch.testing.assert_close(lse.double(), scores.amax(-1), rtol=1e-6, atol=0)
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert dq.abs().max() < 1e-5 * 1e30
    assert dk.abs().max() < 1e-5 * 1e30 * rows
    torch.testing.assert_close(dv.sum(2), torch.full((1, 2, 16), float(rows)))


@pytest.mark.parametrize("rows", [2, 40])
def test_denormal_numbers_count(cpu, poisoned, rows):
    """Values, scores and gradients below 1.2e-38 are neither flushed to zero nor slow to overflow."""
    q, k = torch.randn(1, 2, rows, 24), torch.randn(1, 2, 50, 24)
    v = torch.randn(1, 2, 50, 24) * 1e-40
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = fastattn.attention(*inputs, backend="cpu")
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = fastattn.attention(*exact, backend="reference")
    dout = torch.randn_like(out) * 1e-39
    dv, expected_dv = (
        torch.autograd.grad(result, given[2], dout.to(result.dtype))[0]
        for result, given in ((out, inputs), (expected, exact))
    )
    for result, reference in ((out, expected), (dv, expected_dv)):
        assert (result != 0).any()
        # A sum of n denormals is off by up to n of the smallest.
        torch.testing.assert_close(result.double(), reference, rtol=0, atol=100 * 1.4e-45)
    tiny = torch.full((1, 2, rows, 24), 1e-41)
    mean = fastattn.attention(tiny, torch.full((1, 2, 50, 24), 1e-41), k.detach().new_ones(1, 2, 50, 24))
    torch.testing.assert_close(mean, torch.ones_like(mean))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [2, 40])
def test_denormal_numbers_in_half_precision(cpu, poisoned, dtype, rows):
    """Those of fp16 count in full; those of bf16, below 1.2e-38, may be zero, as in bf16 products."""
    least = torch.finfo(dtype).smallest_normal
    q, k, v, dout = (torch.randn(1, 2, n, 24).to(dtype) for n in (rows, 50, 50, rows))
    v = v * least / 4
    inputs = [x.requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = (
        fastattn.attention(*given, backend=backend)
        for given, backend in ((inputs, "cpu"), (exact, "reference"))
    )
    tiny = dout * least / 4
    (dv,), (expected_dv,) = (
        torch.autograd.grad(result, given[2], tiny.to(result.dtype))
        for result, given in ((out, inputs), (expected, exact))
    )
    allowed = least if dtype == torch.bfloat16 else torch.finfo(dtype).eps * least
    for result, reference in ((out, expected), (dv, expected_dv)):
        assert dtype == torch.bfloat16 or reference.abs().max() > 20 * allowed
        assert (result.double() - reference).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.1, 0.9])
def test_weights_that_fade_below_the_normal_numbers(cpu, poisoned, dtype, dropout_p):
    """ALiBi over 257 keys: weights and gradients of scores grow small enough to be rounded to nothing."""
    case = Case(
        dtype=dtype, lengths=((1, 1), (4, 257)), packed=True, head_dim=1, head_dim_v=1, alibi="heads",
        relative_bias=True, wanted=("q", "k", "v", "relative_bias"),
        options={"dropout_p": dropout_p, "seed": 3},
    )  # fmt: skip
    for _ in range(15):
        oracle.check(case)


@pytest.mark.parametrize("rows", [3, 40])
def test_a_score_of_plus_infinity_spoils_its_own_row_alone(cpu, poisoned, rows):
    """inf - inf has no value: such a row is NaN as in eager attention, and the others are as without it.

    So are their gradients; each key that the row sees gets a NaN from it.
    """
    q, k, v = (torch.randn(1, 2, n, 16) for n in (rows, 60, 60))
    others = torch.arange(rows) != 1

    def results(q, bias=None):
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = fastattn.attention(*inputs, bias=bias, return_lse=True, backend="cpu")
        return [out.detach(), lse.detach(), *torch.autograd.grad(out.sum(), inputs)]

    clean = results(q)
    bias = torch.zeros(1, 1, rows, 60)
    bias[:, :, 1, 7] = math.inf
    infinite = q.clone()
    infinite[:, :, 1] = math.inf
    for spoilt in (results(q, bias), results(infinite)):
        assert spoilt[0][:, :, 1].isnan().all()
        assert spoilt[2][:, :, 1].isnan().all()
        for dirty, expected in zip(spoilt[:3], clean[:3], strict=True):  # out, lse, dq
            torch.testing.assert_close(dirty[:, :, others], expected[:, :, others])
        assert all(x.isnan().all() for x in spoilt[3:])
    assert torch.equal(spoilt[0][:, :, others], clean[0][:, :, others])


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("at", [0, 5, 59])
def test_not_a_number_is_not_taken_for_nothing(cpu, poisoned, rows, at):
    """A NaN among keys that a bias hides is seen, whatever its place in the row: no row of zeros hides it."""
    q, k, v = (torch.randn(1, 2, n, 16) for n in (rows, 60, 60))
    bias = torch.full((1, 1, rows, 60), -math.inf)
    bias[..., at] = math.nan
    out, lse = fastattn.attention(q, k, v, bias=bias, return_lse=True, backend="cpu")
    assert out.isnan().all()
    assert lse.isnan().all()
