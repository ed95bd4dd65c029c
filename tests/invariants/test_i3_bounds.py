"""I3: nothing is written outside the outputs or read outside the inputs."""

from __future__ import annotations

import ctypes
import faulthandler
import math
import mmap
import os
import signal

import pytest
import torch

import fastattn
from fastattn.backends import Gradients
from fastattn.dispatch import load
from fastattn.problem import AttentionInputs, describe

pytestmark = pytest.mark.usefixtures("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_libc = ctypes.CDLL(None, use_errno=True)


class Guarded:
    """Memory that ends, or begins, where touching one more byte ends the process."""

    def __init__(self, num_bytes: int, at_end: bool):
        page = mmap.PAGESIZE
        inner = -(-num_bytes // page) * page
        self.memory = mmap.mmap(-1, inner + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        for fence in (start, start + page + inner):
            if _libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(page), 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        self.offset = page + (inner - num_bytes if at_end else 0)


def guarded_like(x: torch.Tensor, at_end: bool) -> torch.Tensor:
    guard = Guarded(x.numel() * x.element_size(), at_end)
    copy = torch.frombuffer(guard.memory, dtype=x.dtype, count=x.numel(), offset=guard.offset).view(x.shape)
    return copy.copy_(x)


@pytest.mark.parametrize("at_end", [False, True])
def test_the_fences_hold(at_end):
    """A process that reads one byte too far dies of it, so the tests below can fail."""
    x = guarded_like(torch.ones(mmap.PAGESIZE // 4), at_end)
    beyond = x.data_ptr() + (mmap.PAGESIZE if at_end else -1)
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        ctypes.string_at(beyond, 1)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at_end", [False, True], ids=["fence before", "fence behind"])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (5, 7, 17, 3), (33, 65, 40, 24), (66, 130, 64, 100)], ids=str
)
def test_inputs_and_outputs_against_forbidden_pages(dtype, at_end, sizes):
    """An over-read of even one vector faults."""
    seqlen_q, seqlen_k, head_dim, head_dim_v = sizes

    def fenced(*shape, dtype=dtype):
        return guarded_like(torch.randn(shape).to(dtype), at_end)

    q = fenced(2, 2, seqlen_q, head_dim)
    k, v = fenced(2, 1, seqlen_k, head_dim), fenced(2, 1, seqlen_k, head_dim_v)
    inputs = AttentionInputs(
        q, k, v,
        key_mask=guarded_like(torch.rand(2, seqlen_k) > 0.3, at_end),
        bias=fenced(1, 2, seqlen_q, seqlen_k),
        relative_bias=fenced(2, seqlen_q + seqlen_k - 1, dtype=torch.float32),
        alibi_slopes=fenced(2, dtype=torch.float32),
        seed=torch.tensor(1),
    )  # fmt: skip
    problem = describe(inputs, (True, 0.3, 40, -1, 3.0, 0.2, 0, 0), True)
    out, dout = fenced(2, 2, seqlen_q, head_dim_v), fenced(2, 2, seqlen_q, head_dim_v)
    lse, dlse = fenced(2, 2, seqlen_q, dtype=torch.float32), fenced(2, 2, seqlen_q, dtype=torch.float32)
    gradients = Gradients(
        *(guarded_like(x, at_end) for x in (q, k, v)),
        guarded_like(inputs.bias.float(), at_end),
        guarded_like(inputs.relative_bias, at_end),
    )
    load("cpu").forward(problem, inputs, out, lse)
    load("cpu").backward(problem, inputs, out, lse, dout, dlse, gradients)
    assert all(x.isfinite().all() for x in (out, *gradients))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_written_between_rows(dtype):
    """Outputs that are windows into larger tensors leave what surrounds them alone."""
    q, k, v = (torch.randn(2, 3, 21, 24).to(dtype) for _ in range(3))
    inputs = AttentionInputs(q, k, v)
    problem = describe(inputs, (False, 0.2, -1, -1, 0.0, 0.0, 0, 0), True)

    def window():
        around = torch.full((4, 5, 27, 32), 7.0, dtype=dtype)
        return around, around[1:3, 1:4, 3:24, 4:28]

    surroundings, (out, dq, dk, dv) = zip(*(window() for _ in range(4)), strict=True)
    lse = torch.empty(2, 3, 21)
    load("cpu").forward(problem, inputs, out, lse)
    load("cpu").backward(problem, inputs, out, lse, torch.ones_like(q), None, Gradients(dq, dk, dv))
    for around in surroundings:
        around[1:3, 1:4, 3:24, 4:28] = 7.0
        assert (around == 7.0).all()


def test_strides_beyond_32_bits():
    """Rows four billion elements apart, in memory of which only what is touched exists."""
    far = 2**31 + 64
    try:
        memory = mmap.mmap(-1, (3 * far + 1024) * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    except (OSError, ValueError) as error:  # 0x4000 is MAP_NORESERVE on Linux
        pytest.skip(f"this machine maps no sparse memory of {6 * far >> 30} GiB: {error}")
    flat = torch.frombuffer(memory, dtype=torch.bfloat16)
    sparse = flat.as_strided((1, 1, 4, 16), (0, 0, far, 1))
    dense = torch.randn(1, 1, 4, 16).bfloat16()
    sparse.copy_(dense)
    inputs = [x.detach().requires_grad_() for x in (dense, dense, dense)]
    expected = fastattn.attention(*inputs, backend="cpu")
    (expected_dq,) = torch.autograd.grad(expected.sum(), inputs[:1])
    assert torch.equal(fastattn.attention(sparse, sparse, sparse, backend="cpu"), expected.detach())
    q = dense.detach().requires_grad_()
    (dq,) = torch.autograd.grad(fastattn.attention(q, sparse, sparse, backend="cpu").sum(), q)
    assert torch.equal(dq, expected_dq)
    assert math.isfinite(float(dq.float().sum()))


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "head", "row"])
def test_results_with_strides_beyond_32_bits(axis):
    """Gradients and outputs 2^31 elements apart along one axis, in memory that exists where it is touched."""
    far = 2**31 + 64
    shape = [2 if axis == 0 else 1, 2 if axis == 1 else 1, 3, 16]
    strides = [48 * 16, 48 * 8, 16, 1]
    strides[axis] = far
    count = (shape[axis] - 1) * far + 4096
    memories = []

    def sparse():
        try:
            memories.append(mmap.mmap(-1, count * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000))
        except (OSError, ValueError) as error:
            pytest.skip(f"this machine maps no sparse memory of {2 * count >> 30} GiB: {error}")
        return torch.frombuffer(memories[-1], dtype=torch.bfloat16).as_strided(shape, strides)

    dense = [torch.randn(shape).bfloat16() for _ in range(4)]
    problem = describe(AttentionInputs(*dense[:3]), (False, 0.25, -1, -1, 0.0, 0.0, 0, 0), True)
    found = []
    for allocate in (lambda: torch.empty(shape, dtype=torch.bfloat16), sparse):
        q, k, v, dout, out, *gradients = (allocate() for _ in range(8))
        for to, source in zip((q, k, v, dout), dense, strict=True):
            to.copy_(source)
        lse = torch.empty(shape[:3])
        load("cpu").forward(problem, AttentionInputs(q, k, v), out, lse)
        load("cpu").backward(problem, AttentionInputs(q, k, v), out, lse, dout, None, Gradients(*gradients))
        found.append([x.clone() for x in (out, lse, *gradients)])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    assert all(x.isfinite().all() for x in found[0])
