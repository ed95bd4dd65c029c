"""I4: results depend on neither thread count nor batch neighbours; twice the same call is bit-identical."""

from __future__ import annotations

import ctypes

import pytest
import torch

import fastattn

pytestmark = pytest.mark.usefixtures("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS = [{}, {"causal": True}, {"dropout_p": 0.3, "seed": 4}, {"causal": True, "window": (70, None)}]


def results(q, k, v, bias, **options):
    inputs = [x.detach().requires_grad_() for x in (q, k, v, bias)]
    out, lse = fastattn.attention(*inputs[:3], bias=inputs[3], **options, return_lse=True, backend="cpu")
    return [out, lse, *torch.autograd.grad(out.float().square().sum(), inputs)]


def tensors(dtype, batch=3, rows=150):
    q, k, v = (torch.randn(batch, heads, rows, 32).to(dtype) for heads in (4, 2, 2))
    return q, k, v, torch.randn(1, 4, rows, rows)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_any_number_of_threads(threads, dtype, options):
    inputs = tensors(dtype)
    threads(1)
    alone = results(*inputs, **options)
    for count in (2, 3, 7):
        threads(count)
        for x, y in zip(results(*inputs, **options), alone, strict=True):
            assert torch.equal(x, y)


def test_one_long_head_on_many_threads(threads):
    """A single head, and one query over many keys, are split inside: their sums must not depend on how."""
    for rows in (1, 600):
        q, k, v = (torch.randn(1, 1, n, 64) for n in (rows, 1500, 1500))
        found = []
        for count in (1, 2, 5):
            threads(count)
            found.append(results(q, k, v, torch.zeros(1, 1, 1, 1)))
        for other in found[1:]:
            assert all(torch.equal(x, y) for x, y in zip(other, found[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_call_twice(dtype):
    inputs = tensors(dtype)
    first = results(*inputs, causal=True)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(results(*inputs, causal=True), first, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_in_the_batch(dtype):
    q, k, v, bias = tensors(dtype)
    together = results(q, k, v, bias, causal=True)
    alone = results(q[1:2], k[1:2], v[1:2], bias, causal=True)
    for x, y in zip(together[:5], alone[:5], strict=True):
        assert torch.equal(x[1:2], y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_that_change_how_work_is_divided(dtype):
    """Units of three query tiles and of whole heads; alone: of one tile, and of key tiles that take turns."""
    q, k, v = (torch.randn(8, 16, n, 16).to(dtype) for n in (130, 270, 270))
    bias = torch.randn(1, 16, 1, 270)
    together = results(q, k, v, bias, causal=True)
    alone = results(q[1:2], k[1:2], v[1:2], bias, causal=True)
    for x, y in zip(together[:5], alone[:5], strict=True):
        assert torch.equal(x[1:2], y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_or_padded(dtype, options):
    """A sequence gives the same whether padding or other sequences surround it, rounding apart."""
    lengths = (37, 90, 1)
    rows = [torch.randn(n, 2, 32).to(dtype) for n in lengths]
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    flat = torch.cat(rows)
    packed = fastattn.varlen_attention(flat, flat, flat, offsets, **options, backend="cpu")
    for b, row in enumerate(rows):
        padded = torch.zeros(3, 2, lengths[b], 32, dtype=dtype)
        padded[b] = row.transpose(0, 1)
        alone = fastattn.attention(padded, padded, padded, **options, backend="cpu")[b].transpose(0, 1)
        difference = (packed[offsets[b] : offsets[b + 1]].float() - alone.float()).abs().max()
        assert difference <= 4 * torch.finfo(dtype).eps * flat.abs().max()


def test_no_more_threads_than_torch_may_use(threads, cpu, monkeypatch):
    """The pool is asked for as many ranges as torch.set_num_threads allows, or fewer for less work."""
    asked = []
    range_type = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)

    @ctypes.CFUNCTYPE(
        ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, range_type, ctypes.c_void_p
    )
    def pool(begin, end, grain, run, context):
        asked.append(end - begin)
        for i in range(begin, end):
            run(i, i + 1, context)
        return 0

    monkeypatch.setattr(cpu, "_parallel_for", ctypes.cast(pool, ctypes.c_void_p).value)
    monkeypatch.setattr(cpu, "_executors", {})
    inputs = tensors(torch.float32)
    expected = None
    for count in (2, 3, 7):
        threads(count)
        asked.clear()
        found = results(*inputs)
        assert asked
        assert max(asked) == count
        assert expected is None or all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        expected = found
    threads(1)
    asked.clear()
    results(*inputs)
    assert not asked, "one thread needs no pool"
    threads(7)
    one = torch.randn(1, 1, 5, 16)
    fastattn.attention(one, one, one, backend="cpu")
    assert not asked, "one unit of work needs no pool"
