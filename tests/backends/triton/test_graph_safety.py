"""That a call could be captured in a CUDA graph: it waits for nothing, and allocates what is listed here.

On CPU tensors with a driver that launches nothing (fake_cuda.py). Every operation that torch is asked for is
seen, also those inside of fastattn's ops; a capture allows no others than these, and
its memory is that of the results and the workspace.
"""

import doubles
import fake_cuda
import pytest
import torch
from watch import WAITS, Watch

import fastattn

pytestmark = pytest.mark.skipif(fake_cuda.why_not() is not None, reason=str(fake_cuda.why_not()))

B, H, N, D = 2, 4, 100, 64
HALF, FLOAT = torch.float16, torch.float32
Q, LSE = ((B, H, N, D), HALF), ((B, H, N), FLOAT)
ROWS, ROWS_LSE = ((B * N, H, D), HALF), ((H, B * N), FLOAT)
RANDOM = dict(dropout_p=0.1, seed=torch.tensor([7]))  # of shape (1,): on the device, see doubles.py


def padded(q, k, v, **options):
    return fastattn.attention(q, k, v, backend="triton", **options)


def packed(q, k, v):
    offsets = torch.tensor([0, 30, B * N], dtype=torch.int32)

    def call():
        return fastattn.varlen_attention(q, k, v, offsets, max_seqlen_q=B * N, causal=True, backend="triton")

    return call


KEY_MASK, BIAS = torch.rand(B, N) > 0.3, torch.randn(1, H, N, N).half()
CASES = {
    # name: (options, what forward allocates, what backward allocates besides dq, dk and dv)
    "plain": ({}, [Q, LSE], [LSE]),
    "causal": (dict(causal=True), [Q, LSE], [LSE]),
    "key mask": (dict(key_mask=KEY_MASK), [Q, LSE, ((B, N), torch.int32)], [LSE, ((B, N), torch.int32)]),
    "bias": (dict(bias=BIAS), [Q, LSE], [LSE]),
    "dropout": (RANDOM, [Q, LSE], [LSE]),
}


def leaves(shape):
    return [torch.randn(shape).half().requires_grad_() for _ in range(3)]


def watched(function):
    with Watch() as seen:
        found = function()
    assert not WAITS & set(seen.names), seen.names
    assert not any("copy" in name for name in seen.names if name != "_to_copy"), seen.names
    return found, seen


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name, fake):
    device = fake(80, simulate=False)
    options, forward, backward = CASES[name]
    q, k, v = leaves((B, H, N, D))
    upstream = torch.randn(B, H, N, D).half()
    out, seen = watched(lambda: padded(q, k, v, **options))
    assert sorted(seen.allocated, key=str) == sorted(forward, key=str)
    _, seen = watched(lambda: torch.autograd.grad(out, (q, k, v), upstream))
    assert sorted(seen.allocated, key=str) == sorted([Q] * 3 + backward, key=str)
    assert device.kernels == ["forward_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel"]


def test_packed(fake):
    fake(80, simulate=False)
    q, k, v = leaves((B * N, H, D))
    out, seen = watched(packed(q, k, v))
    assert sorted(seen.allocated, key=str) == sorted([ROWS, ROWS_LSE], key=str)
    _, seen = watched(lambda: torch.autograd.grad(out, (q, k, v), torch.randn(B * N, H, D).half()))


def test_dropout_without_a_seed_draws_one_and_leaves_it_there(fake, monkeypatch):
    fake(80, simulate=False)
    monkeypatch.setattr(doubles.launch_module(), "_read_in_kernels", lambda seed: True)
    q, k, v = leaves((B, H, N, D))
    out, seen = watched(lambda: padded(q, k, v, dropout_p=0.1))
    drawn = [what for what in seen.allocated if what[1] == torch.int64]
    assert len(drawn) == 1
    assert sorted(seen.allocated, key=str) == sorted([Q, LSE, *drawn], key=str)
    watched(lambda: torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))


def test_decoding(fake):
    """One row a sequence: the parts of split keys are workspace, and nothing else is."""
    device = fake(80, simulate=False)
    q, k = torch.randn(1, H, 1, D).half(), torch.randn(1, 1, 2000, D).half()
    _, seen = watched(lambda: padded(q, k, k, causal=True))
    nothing = ((0,), FLOAT)  # for the lse that nobody asked for
    parts = [what for what in seen.allocated if what[0][0] > 1]
    assert [len(shape) for shape, _ in sorted(parts, key=str)] in ([4, 5], [5, 4])
    assert sorted(seen.allocated, key=str) == sorted([((1, H, 1, D), HALF), nothing, *parts], key=str)
    assert device.kernels == ["forward_kernel", "merge_kernel"]


def test_prefix(fake):
    """Merged by torch's operations: no reading back, all of the results' sizes."""
    device = fake(80, simulate=False)
    q, k, v = leaves((B, H, N, D))
    prefix = [torch.randn(1, H, 33, D).half().requires_grad_() for _ in range(2)]
    out, seen = watched(lambda: fastattn.prefix_attention(q, k, v, *prefix, backend="triton"))
    assert max(torch.Size(shape).numel() for shape, _ in seen.allocated) == q.numel()
    _, seen = watched(lambda: torch.autograd.grad(out, (q, k, v, *prefix), torch.randn_like(out)))
    assert max(torch.Size(shape).numel() for shape, _ in seen.allocated) == q.numel()
    assert {*device.kernels} == {"forward_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel"}


def test_what_waits_is_seen(fake):
    """The watch looks into the op, where a seed that the host holds is read."""
    fake(80, simulate=False)
    with Watch() as seen:
        padded(*leaves((1, 1, 4, 16)), dropout_p=0.5, seed=torch.tensor(3))
    assert WAITS & set(seen.names)
