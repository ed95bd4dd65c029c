"""I1: at most twice as far from the float64 reference as PyTorch in the same dtype is, plus a floor."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings

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
    case = oracle.Case(dtype=dtype, lengths=((66, 129),), kv_heads=1, head_dim=head_dim, head_dim_v=head_dim)
    oracle.check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (100, 0)}], ids=str)
def test_long_sequences(cpu, poisoned, dtype, options):
    oracle.check(oracle.Case(dtype=dtype, lengths=((550, 600),), kv_heads=1, head_dim=64, options=options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding_one_query(cpu, poisoned, dtype):
    case = oracle.Case(dtype=dtype, lengths=((1, 1500),) * 2, kv_heads=2, group=3, head_dim=64, head_dim_v=64)
    oracle.check(case)


@pytest.mark.parametrize("magnitude", [1e-30, 1e3])
def test_scores_far_from_one(cpu, poisoned, magnitude):
    """Softmax of all but equal scores, and of scores of which one wins: nothing overflows."""
    case = oracle.Case(lengths=((33, 77),), options={"scale": magnitude}, head_dim=24)
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
