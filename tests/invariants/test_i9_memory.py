"""I9: no buffer of Nq x Nk; what is saved for backward is what explain() says."""

from __future__ import annotations

import sys

import pytest
import torch

import fastattn
from fastattn.bench.scaling import extra_bytes

pytestmark = pytest.mark.usefixtures("cpu")


def saved_bytes(call) -> int:
    """Bytes that autograd keeps alive for backward, each storage counted once."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(storages.values())


def tensors(dtype, **wants):
    q, k, v = (torch.randn(2, heads, n, 16, dtype=dtype) for heads, n in ((4, 33), (2, 50), (2, 50)))
    for name, x in (("q", q), ("k", k), ("v", v)):
        x.requires_grad_(wants.get(name, False))
    return q, k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "softcap": 3.0},
        {"key_mask": torch.rand(2, 50) > 0.5, "alibi_slopes": torch.rand(4)},
        {"bias": torch.randn(4, 33, 50), "relative_bias": torch.randn(4, 82)},
        {"dropout_p": 0.1, "seed": 3},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_explain_counts_what_autograd_saves(dtype, wanted, options):
    q, k, v = tensors(dtype, **dict.fromkeys(wanted, True))
    counted = saved_bytes(lambda: fastattn.attention(q, k, v, **options))
    assert fastattn.explain(q, k, v, **options).saved_bytes == counted > 0


def test_views_of_one_projection_count_once():
    qkv = torch.randn(2, 20, 3, 4, 16, requires_grad=True)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    counted = saved_bytes(lambda: fastattn.attention(q, k, v))
    out_and_lse = 2 * 20 * 4 * 16 * 4 + 2 * 4 * 20 * 4
    assert fastattn.explain(q, k, v).saved_bytes == counted == qkv.numel() * 4 + out_and_lse


def test_packed():
    q = torch.randn(30, 4, 16, requires_grad=True)
    offsets = torch.tensor([0, 12, 30], dtype=torch.int32)
    counted = saved_bytes(lambda: fastattn.varlen_attention(q, q, q, offsets, causal=True))
    assert fastattn.explain(q, q, q, offsets, causal=True).saved_bytes == counted


def test_nothing_is_saved_when_nothing_needs_a_gradient():
    q, k, v = tensors(torch.float32)
    assert saved_bytes(lambda: fastattn.attention(q, k, v)) == 0
    assert fastattn.explain(q, k, v).saved_bytes == 0
    q.requires_grad_()
    with torch.no_grad():
        assert saved_bytes(lambda: fastattn.attention(q, k, v)) == 0
        assert fastattn.explain(q, k, v).saved_bytes == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("length", "heads", "group"), [(512, 1, 1), (12288, 1, 1), (2048, 16, 1), (2048, 8, 8)], ids=str
)
def test_a_thread_needs_little_beyond_results(dtype, length, heads, group):
    """At most 8 MiB at any length, where all scores of 12288 rows would be 576 MiB in float32."""
    before = torch.get_num_threads()
    found = extra_bytes(length, heads, dtype, group)
    assert found is not None
    assert found <= 8 << 20
    assert torch.get_num_threads() == before


def test_flops_of_known_problems():
    q = torch.randn(2, 4, 8, 16, requires_grad=True)
    full = fastattn.explain(q, q, q)
    assert full.forward_flops == 4 * 2 * 4 * 8 * 8 * 16
    assert full.backward_flops == full.forward_flops * 5 // 2
    causal = fastattn.explain(q, q, q, causal=True)
    assert causal.forward_flops * 64 == full.forward_flops * 36
    only_v = fastattn.explain(q.detach(), q.detach(), q)
    assert only_v.backward_flops == full.forward_flops
    window = fastattn.explain(q, q, q, window=(1, 1))
    assert window.forward_flops * 64 == full.forward_flops * 22
