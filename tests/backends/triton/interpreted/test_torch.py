"""The ops with this backend under what PyTorch does to ops: opcheck, and a compiler's one graph."""

import pytest
import test_ops
import torch

import fastattn
from fastattn import ops


def arguments(kind, *rest):
    return tuple("triton" if isinstance(x, str) else x for x in test_ops.forward_arguments(kind, *rest))


def first_quick(*names):
    return [names[0], *(pytest.param(name, marks=pytest.mark.slow) for name in names[1:])]


@pytest.mark.parametrize("kind", first_quick(*test_ops.KINDS))
def test_opcheck(kind):
    torch.library.opcheck(ops.forward, arguments(kind, True))
    *given, _, _ = arguments(kind, False)
    out, lse = ops.forward(*given, True, True)
    needs = [given[at] is not None for at in (0, 1, 2, 4, 5)]
    torch.library.opcheck(
        ops.backward, (torch.randn_like(out), torch.randn_like(lse), out, lse, needs, *given)
    )


def padded(q, k, v, bias):
    out, lse = fastattn.attention(
        q * 2, k, v, bias=bias, causal=True, dropout_p=0.2, seed=3, return_lse=True, backend="triton"
    )
    return out.square().sum() + lse.sum()


def packed(q, k, v, _):
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    offsets = torch.tensor([0, 4, 18], dtype=torch.int32), torch.tensor([0, 11, 22], dtype=torch.int32)
    out = fastattn.varlen_attention(*rows, *offsets, max_seqlen_q=14, max_seqlen_k=11, backend="triton")
    return out.square().sum()


def prefix(q, k, v, _):
    out = fastattn.prefix_attention(q, k, v, k[:1, :, :5], v[:1, :, :5], causal=True, backend="triton")
    return out.square().sum()


@pytest.mark.parametrize("function", first_quick(padded, packed, prefix))
def test_compiled_in_one_graph_gives_the_same(function):
    """Forward and backward, with autograd traced as well (aot_eager)."""
    inputs = (*test_ops.qkv(), torch.randn(4, 9, 11))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        leaves = test_ops.leaves(*inputs)
        call(*leaves).backward()
        results.append([x.grad for x in leaves if x.grad is not None])
    assert len(results[0]) >= 3
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)
