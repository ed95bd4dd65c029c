"""The ops under what PyTorch does to ops: opcheck, compile, autocast, checkpointing, torch.func, DDP."""

from __future__ import annotations

import multiprocessing
import socket
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import ops
from fastattn.errors import InvalidArgumentError, UnsupportedError

pytestmark = pytest.mark.usefixtures("cpu")


def leaves(*tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


def qkv():
    return torch.randn(2, 4, 9, 16), torch.randn(2, 2, 11, 16), torch.randn(2, 2, 11, 8)


def forward_arguments(kind: str, grad: bool, need_lse: bool = True):
    q, k, v = qkv()
    optional = [None] * 7
    longest = 0
    if kind == "every feature":
        bias, relative_bias = torch.randn(1, 4, 9, 11), torch.randn(4, 19)
        optional = [torch.rand(2, 11) > 0.3, bias, relative_bias, torch.rand(4), None, None, torch.tensor(3)]
    elif kind == "transposed":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    elif kind == "packed":
        q, k, v = torch.randn(9, 4, 16), torch.randn(11, 2, 16), torch.randn(11, 2, 16)
        offsets = [torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 9], [0, 5, 11])]
        optional, longest = [None] * 4 + offsets + [None], 6
    tensors = [q, k, v, *optional]
    if grad:
        tensors = [
            x.requires_grad_() if i in (0, 1, 2, 4, 5) and x is not None else x for i, x in enumerate(tensors)
        ]
    dropout_p = 0.2 if optional[-1] is not None else 0.0
    return (*tensors, True, 0.25, -1, -1, 0.0, dropout_p, longest, longest, "cpu", grad, need_lse)


KINDS = ["plain", "every feature", "transposed", "packed"]


@pytest.mark.parametrize(
    ("grad", "need_lse"), [(False, False), (False, True), (True, True)], ids=["out", "out, lse", "grad"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_forward(kind, grad, need_lse):
    torch.library.opcheck(ops.forward, forward_arguments(kind, grad, need_lse))


@pytest.mark.parametrize("needs", [[True] * 5, [False, True, False, True, False]], ids=["all", "k, bias"])
@pytest.mark.parametrize("with_dlse", [False, True], ids=["dout", "dout, dlse"])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_backward(kind, needs, with_dlse):
    *arguments, _, _ = forward_arguments(kind, False)
    out, lse = ops.forward(*arguments, True, True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse) if with_dlse else None
    needs = [need and arguments[at] is not None for need, at in zip(needs, (0, 1, 2, 4, 5), strict=True)]
    torch.library.opcheck(ops.backward, (dout, dlse, out, lse, needs, *arguments))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_in_one_graph_gives_the_same(compiler):
    def function(q, k, v, bias):
        out, lse = fastattn.attention(q * 2, k, v, bias=bias, causal=True, return_lse=True)
        return out.square().sum() + lse.sum()

    inputs = (*qkv(), torch.randn(4, 9, 11))
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    expected, actual = leaves(*inputs), leaves(*inputs)
    function(*expected).backward()
    compiled(*actual).backward()
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_compiled_packed_with_dynamic_sizes_and_dropout():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def function(q, offsets):
        return fastattn.varlen_attention(q, q, q, offsets, max_seqlen_q=8, dropout_p=0.5, seed=3)

    for total in (6, 9):
        q = torch.randn(total, 2, 16, requires_grad=True)
        offsets = torch.tensor([0, 2, total], dtype=torch.int32)
        out = function(q, offsets)
        expected = fastattn.varlen_attention(q, q, q, offsets, max_seqlen_q=8, dropout_p=0.5, seed=3)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(*(torch.autograd.grad(x.sum(), q)[0] for x in (out, expected)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_computes_in_its_dtype(backend):
    q, k, v = leaves(*qkv())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fastattn.attention(q, k, v, backend=backend)
    explicit = fastattn.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend=backend)
    assert torch.equal(out, explicit)
    out.sum().backward()
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_dropout_again(use_reentrant):
    def function(q, k, v):
        return fastattn.attention(q, k, v, dropout_p=0.4)

    plain, again = leaves(*qkv()), None
    again = leaves(*plain)
    torch.manual_seed(1)
    expected = function(*plain)
    torch.manual_seed(1)
    actual = checkpoint(function, *again, use_reentrant=use_reentrant)
    assert torch.equal(actual, expected)
    expected.square().sum().backward()
    torch.randn(5)  # whatever else was drawn in between
    actual.square().sum().backward()
    for x, y in zip(again, plain, strict=True):
        assert torch.equal(x.grad, y.grad)


def test_vmap_runs_a_loop_and_says_so():
    q, k, v = qkv()
    with pytest.warns(UserWarning, match="vmap calls fastattn::forward 3 times"):
        actual = torch.vmap(lambda q: fastattn.attention(q, k, v))(torch.stack([q, 2 * q, 3 * q]))
    torch.testing.assert_close(actual[2], fastattn.attention(3 * q, k, v))


def test_func_grad_alone_and_under_vmap():
    q, k, v = qkv()

    def loss(q):
        return fastattn.attention(q, k, v).square().sum()

    (leaf,) = leaves(q)
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(q), leaf.grad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        per_sample = torch.vmap(torch.func.grad(loss))(torch.stack([q, q]))
    torch.testing.assert_close(per_sample[1], leaf.grad)


def test_forward_mode_and_second_derivatives_are_refused():
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda q: fastattn.attention(q, k, v), (q,), (q,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        fastattn.attention(torch.autograd.forward_ad.make_dual(q, q), k, v)
    (q,) = leaves(q)
    (dq,) = torch.autograd.grad(fastattn.attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivative"):
        dq.sum().backward()


def test_alibi_slopes_that_want_a_gradient_are_refused():
    slopes = torch.rand(4, requires_grad=True)
    with pytest.raises(InvalidArgumentError) as caught:
        fastattn.attention(*qkv(), alibi_slopes=slopes)
    assert caught.value.argument == "alibi_slopes"
    with torch.no_grad():
        fastattn.attention(*qkv(), alibi_slopes=slopes)


def test_only_the_gradients_wanted_are_computed(monkeypatch):
    asked = []
    compute = ops._compute_backward
    monkeypatch.setattr(ops, "_compute_backward", lambda *args: asked.append(args[4]) or compute(*args))
    q, k, v = qkv()
    fastattn.attention(q, k.requires_grad_(), v).sum().backward()
    assert asked == [[False, True, False, False, False]]


def test_the_profiler_sees_the_ops():
    q, k, v = leaves(*qkv())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fastattn.attention(q, k, v).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"fastattn::forward", "fastattn::backward"} <= names


def test_fake_and_meta_tensors_compute_nothing():
    with torch._subclasses.FakeTensorMode():
        q, k, v = (torch.empty_like(x, device="cpu") for x in (torch.empty(2, 4, 9, 16),) * 3)
        assert fastattn.attention(q, k, v).shape == (2, 4, 9, 16)
    assert fastattn.attention(*(x.to("meta") for x in qkv())).shape == (2, 4, 9, 8)


def test_export():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return fastattn.attention(q, k, v)

    program = torch.export.export(Module(), qkv())
    assert any(node.target is ops.forward for node in program.graph.nodes)


def _train_in_parallel(rank: int, port: int, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    module = fastattn.MultiHeadAttention(16, 2, batch_first=True)
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    x = torch.randn(2, 3, 5, 16)
    parallel(x[rank], x[rank], x[rank], need_weights=False)[0].sum().backward()
    if rank == 0:
        ddp = module.in_proj_weight.grad.clone()
        module.zero_grad()
        both = x.flatten(0, 1)
        (module(both, both, both, need_weights=False)[0].sum() / 2).backward()
        results.put(float((ddp - module.in_proj_weight.grad).abs().max()))
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_averages_gradients():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Not by fork: what other tests left running in this process (compilers, profilers) may hold a lock then.
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_train_in_parallel, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        assert results.get(timeout=120) < 1e-5
    finally:
        for process in processes:
            process.join(timeout=30)
            process.kill()


class _Attends(torch.utils.data.Dataset):
    """Attention and its gradients on two threads, which the worker's default of one would not start."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.set_num_threads(2)
        q, k, v = torch.randn(3, 1, 4, 300, 16, generator=torch.Generator().manual_seed(index))
        return attention_and_gradients(q, k, v)


def attention_and_gradients(*inputs):
    inputs = leaves(*inputs)
    out = fastattn.attention(*inputs, causal=True, backend="cpu")
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


def test_workers_forked_after_use():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    attention_and_gradients(*torch.randn(3, 1, 4, 300, 16))
    expected = [_Attends()[index] for index in range(4)]
    torch.set_num_threads(before)
    loader = torch.utils.data.DataLoader(
        _Attends(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for found, alone in zip(loader, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(found, alone, strict=True))
