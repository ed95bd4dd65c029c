"""What the backend protocol promises beyond right numbers: nothing leaks, nothing is left unwritten."""

import importlib
import math

import prefixes
import pytest
import torch
from doubles import Recorder

import fastattn
from fastattn.backends import Gradients
from fastattn.backends.triton import configs, launch
from fastattn.errors import InvalidArgumentError

# The package's attribute of this name is the backend object.
backend_module = importlib.import_module("fastattn.backends.triton.backend")


@pytest.fixture
def prepared_anew():
    """Nothing prepared before or by this test is used outside of it."""
    launch.forget()
    yield
    launch.forget()


def attend(q, k, v, **options):
    return fastattn.attention(q, k, v, backend="triton", **options)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{"key_mask": True}, {"window": (3, 4)}], ids=["key_mask", "window"])
def test_what_no_query_sees_may_hold_anything(garbage, options):
    q, k, v = torch.randn(1, 2, 20, 16), torch.randn(1, 2, 90, 16), torch.randn(1, 2, 90, 16)
    hidden = torch.zeros(90, dtype=torch.bool)
    if "key_mask" in options:
        hidden = torch.rand(90) < 0.5
        options = {"key_mask": ~hidden[None]}
    else:
        hidden[: 70 - 3] = True  # the first query stands at key 70
    clean = [x.clone().requires_grad_() for x in (q, k, v)]
    dirty = [x.clone() for x in (q, k, v)]
    for x in dirty[1:]:
        x[:, :, hidden] = garbage
    dirty = [x.requires_grad_() for x in dirty]
    outs = [attend(*x, **options) for x in (clean, dirty)]
    for out in outs:
        out.sum().backward()
    assert torch.equal(*outs)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a.grad, b.grad)
    assert not dirty[1].grad[:, :, hidden].any()
    assert not dirty[2].grad[:, :, hidden].any()


def test_bias_may_hide_whole_rows():
    q, k, v = (torch.randn(1, 1, 40, 16, requires_grad=True) for _ in range(3))
    bias = torch.zeros(1, 1, 40, 40)
    bias[:, :, 7] = -math.inf
    out, lse = attend(q, k, v, bias=bias, return_lse=True)
    assert not out[:, :, 7].any()
    assert lse[0, 0, 7] == -math.inf
    out.sum().backward()
    assert not q.grad[:, :, 7].any()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_twice_the_same_call_is_bit_identical():
    q, k, v = (torch.randn(1, 4, 50, 16, requires_grad=True) for _ in range(3))
    runs = []
    for _ in range(2):
        out = attend(q, k[:, :2], v[:, :2], causal=True, dropout_p=0.2, seed=5)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_splitting_the_keys_changes_nothing_but_rounding(monkeypatch, prepared_anew):
    q, k, v = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 500, 32), torch.randn(2, 2, 500, 24)
    results = []
    for splits in (1, 2, 5, 7):
        monkeypatch.setattr(configs, "decode_splits", lambda *_, splits=splits: splits)
        launch.forget()
        results.append(attend(q, k, v, window=(40, None), return_lse=True))
    for out, lse in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, results[0][1], rtol=1e-5, atol=1e-6)


def test_offsets_of_far_rows_are_counted_in_64_bits(prepared_anew):
    """Rows 2**26 elements apart: the 33rd is beyond 32 bits. Only the pages touched take memory."""
    rows, stride = 70, 2**26
    storage = torch.empty((rows - 1) * stride + 64, dtype=torch.float16)
    far = storage.as_strided((1, 1, rows, 64), (0, 0, stride, 1)).copy_(torch.randn(1, 1, rows, 64))
    for q, k in ((torch.randn(1, 1, 33, 64).half(), far), (far, torch.randn(1, 1, 33, 64).half())):
        near_q, near_k = (x.contiguous().requires_grad_() for x in (q, k))
        far_q, far_k = (x.detach().requires_grad_() for x in (q, k))
        near, out = attend(near_q, near_k, near_k), attend(far_q, far_k, far_k)
        assert torch.equal(out, near)
        seed = torch.randn_like(out)
        expected = torch.autograd.grad(near, (near_q, near_k), seed)
        found = torch.autograd.grad(out, (far_q, far_k), seed)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_prefix_is_keys_in_front_of_the_others(poisoned):
    prefixes.check(torch.float32, 1e-5)


def test_few_queries_share_a_tile_with_their_group():
    problem_of = fastattn.problem.describe
    q, k = torch.randn(1, 8, 1, 16), torch.randn(1, 2, 300, 16)
    inputs = fastattn.problem.AttentionInputs(q, k, k)
    problem = problem_of(inputs, (False, 0.25, -1, -1, 0.0, 0.0, 0, 0), False)
    config, fold_heads, splits = launch.plan_forward(problem, configs.INTERPRETER, 132, "ieee")
    assert fold_heads
    assert splits == 1  # 300 keys are too few to share out
    assert config.block_m == 16


def test_packed_rows_without_a_sequence_are_cleared(poisoned):
    total = 150
    q, k, v = (torch.randn(total, 2, 16, requires_grad=True) for _ in range(3))
    offsets = torch.tensor([3, 40, 60], dtype=torch.int32)
    out, lse = fastattn.varlen_attention(q, k, v, offsets, max_seqlen_q=37, return_lse=True, backend="triton")
    loose = torch.ones(total, dtype=torch.bool)
    loose[3:60] = False
    assert not out[loose].any()
    assert (lse[:, loose] == -math.inf).all()
    out.sum().backward()
    for x in (q, k, v):
        assert not x.grad[loose].any()
        assert x.grad.isfinite().all()


def test_understated_max_seqlen_is_an_error_where_offsets_can_be_read():
    q = torch.randn(20, 1, 16)
    offsets = torch.tensor([0, 20], dtype=torch.int32)
    with pytest.raises(InvalidArgumentError, match="max_seqlen_q"):
        fastattn.varlen_attention(q, q, q, offsets, max_seqlen_q=10, max_seqlen_k=20, backend="triton")


def test_understated_max_seqlen_gives_nan_where_they_cannot(monkeypatch):
    """On a GPU the offsets stay on the device, so the kernel itself has to be loud."""
    monkeypatch.setattr(backend_module, "check_offsets", lambda *_: None)
    q = torch.randn(80, 1, 16)
    offsets = torch.tensor([0, 70, 80], dtype=torch.int32)
    out, lse = fastattn.varlen_attention(
        q, q, q, offsets, max_seqlen_q=40, max_seqlen_k=70, return_lse=True, backend="triton"
    )
    assert out[:70].isnan().all()
    assert lse[:, :70].isnan().all()
    assert out[70:].isfinite().all()


def test_only_wanted_gradients_are_launched(monkeypatch, prepared_anew):
    launched = []

    for name in ("delta_kernel", "dq_kernel", "dkdv_kernel", "dbias_kernel", "join_diagonals_kernel"):
        monkeypatch.setattr(launch, name, Recorder(getattr(launch, name), launched))
    q = torch.randn(1, 1, 8, 16)
    inputs = fastattn.problem.AttentionInputs(q, q, q)
    problem = fastattn.problem.describe(inputs, (False, 0.25, -1, -1, 0.0, 0.0, 0, 0), True)
    lse = torch.zeros(1, 1, 8)

    def kernels(**wanted):
        launched.clear()
        launch.backward(problem, inputs, q, lse, q, None, Gradients(**wanted), configs.INTERPRETER)
        return [kernel.fn.__name__ for kernel, _, _ in launched]

    assert kernels(dq=q) == ["delta_kernel", "dq_kernel"]
    assert kernels(dv=q) == ["dkdv_kernel"]  # no delta: dv needs the weights alone
    assert launched[0][2]["WANT_DK"] is False
    assert kernels(dk=q) == ["delta_kernel", "dkdv_kernel"]
    assert launched[1][2]["WANT_DV"] is False
    assert kernels(dbias=torch.empty(1, 1, 8, 8)) == ["delta_kernel", "dbias_kernel"]
