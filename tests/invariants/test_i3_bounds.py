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
    for written in (out, lse, *gradients):
        written.fill_(math.nan)
    load("cpu").forward(problem, inputs, out, lse)
    load("cpu").backward(problem, inputs, out, lse, dout, dlse, gradients)
    assert all(x.isfinite().all() for x in (out, *gradients))
    assert not lse.isnan().any()
    assert all((x != 0).any() for x in (out, *gradients)) or seqlen_q == 1


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


FAR = 2**31 + 64


def sparse(shape, strides, dtype) -> torch.Tensor:
    """A tensor in memory of which only what is touched exists."""
    size = torch.empty(0, dtype=dtype).element_size()
    count = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 4096
    try:
        memory = mmap.mmap(-1, count * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    except (OSError, ValueError) as error:  # 0x4000 is MAP_NORESERVE on Linux
        pytest.skip(f"this machine maps no sparse memory of {count * size >> 30} GiB: {error}")
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


def ordinary(shape, strides, dtype) -> torch.Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [3, 11], ids=["few rows", "tiles of rows"])
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "head", "row"])
def test_strides_beyond_32_bits(axis, rows, dtype):
    """Inputs, outputs and gradients 2^31 elements apart along one axis."""
    shape = [2 if axis == 0 else 1, 2 if axis == 1 else 1, rows, 16]
    strides = [rows * 16 * 2, rows * 16, 16, 1]
    strides[axis] = FAR
    dense = [torch.randn(shape).to(dtype) for _ in range(4)]
    of_rows = [FAR if i == axis else n for i, n in enumerate((2 * rows, rows, 1))]
    of_bias = [FAR if i == axis else n for i, n in enumerate((2 * rows * rows, rows * rows, rows, 1))]
    key_mask = torch.rand(shape[0], rows) > 0.2
    bias = torch.randn(shape[0], shape[1], rows, rows).to(dtype)
    relative_bias = torch.randn(shape[1], 2 * rows - 1)
    options = (False, 0.25, -1, -1, 0.0, 0.0, 0, 0)
    found = []
    for allocate in (ordinary, sparse):
        q, k, v, dout, out, dq, dk, dv = (allocate(shape, strides, dtype) for _ in range(8))
        for to, source in zip((q, k, v, dout), dense, strict=True):
            to.copy_(source)
        # Strides of the row statistics are those of batch and heads: rows lie side by side.
        lse, dlse = (allocate(shape[:3], [*of_rows[:2], 1], torch.float32) for _ in range(2))
        dlse.fill_(0.5)
        inputs = AttentionInputs(
            q, k, v,
            key_mask=allocate(key_mask.shape, (FAR, 1), torch.bool).copy_(key_mask),
            bias=allocate(bias.shape, of_bias, dtype).copy_(bias),
            relative_bias=allocate(relative_bias.shape, (FAR, 1), torch.float32).copy_(relative_bias),
        )  # fmt: skip
        gradients = Gradients(
            dq, dk, dv,
            allocate(bias.shape, of_bias, torch.float32),
            allocate(relative_bias.shape, (FAR, 1), torch.float32),
        )  # fmt: skip
        problem = describe(inputs, options, True)
        load("cpu").forward(problem, inputs, out, lse)
        load("cpu").backward(problem, inputs, out, lse, dout, dlse, gradients)
        found.append([x.clone() for x in (out, lse, *gradients)])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
    assert all(x.isfinite().all() for x in found[0])
