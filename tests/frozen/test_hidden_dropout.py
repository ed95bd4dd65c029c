"""Dropout of hidden states: the stream that is written down, whatever the layout, threads and dtype."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastattn import ops, philox
from fastattn.errors import FastattnError
from fastattn.frozen import replace_dropouts, restore_dropouts, set_packing
from fastattn.frozen.dropout import Dropout
from fastattn.frozen.recompute import Recompute

pytestmark = pytest.mark.usefixtures("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def no_packing():
    set_packing(None)
    yield
    set_packing(None)


def op(x, seed, p=0.3, seqlen=1, cu_seqlens=None):
    return ops.hidden_dropout(x, torch.tensor(seed), cu_seqlens, seqlen, p)


def expected(x: torch.Tensor, seed: int, p: float) -> torch.Tensor:
    """(B, N, C) by the text of philox.py."""
    batch, seqlen, channels = x.shape
    keep = philox.keep_mask(
        torch.tensor(seed), p, batch=batch, num_heads=1, seqlen_q=seqlen, seqlen_k=channels
    )
    scaled = (x.float() * philox.keep_scale(p)).to(x.dtype)
    return torch.where(keep[:, 0], scaled, torch.zeros_like(x))


@pytest.mark.parametrize("channels", [1, 7, 16, 128, 131, 384, 1000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_the_library_draws_what_the_text_says(dtype, channels, p):
    x = torch.randn(3, 5, channels).to(dtype)
    for seed in (0, 2**63 - 1, -5):
        out = op(x.view(-1, channels), seed, p, seqlen=5)
        assert torch.equal(out.view(x.shape), expected(x, seed, p))


@pytest.mark.parametrize("threads", [1, 3])
def test_packed_is_padded_without_its_padding(threads):
    lengths = [4, 0, 9, 1, 30]
    x = torch.randn(5, 30, 40)
    padded = op(x.view(-1, 40), 7, seqlen=30).view(x.shape)
    mask = torch.arange(30) < torch.tensor(lengths)[:, None]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        packed = op(x[mask], 7, cu_seqlens=offsets)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(packed, padded[mask])


def test_rows_that_lie_apart_and_values_that_are_no_numbers():
    wide = torch.randn(6, 4, 40).transpose(0, 1)
    out = op(wide.reshape(-1, 40), 3, seqlen=6).view(wide.shape)
    assert torch.equal(out, expected(wide.contiguous(), 3, 0.3))
    x = torch.full((2, 64), float("nan"))
    kept = expected(torch.ones(2, 1, 64), 3, 0.3).view(2, 64) > 0
    assert torch.equal(op(x, 3).isnan(), kept)
    assert op(x[:0], 3).shape == (0, 64)


def test_offsets_that_do_not_fit_are_refused():
    x = torch.randn(6, 8)
    for offsets in ([0, 5], [0, 7], [1, 6], [0, 4, 3, 6]):
        with pytest.raises(FastattnError, match="cu_seqlens"):
            op(x, 1, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))


def chi_square(kept: torch.Tensor, p: float, groups: int) -> float:
    """Of the number of kept elements in each of `groups` equal parts, in standard deviations."""
    counts = kept.reshape(groups, -1).double().sum(1)
    n = kept.numel() / groups
    statistic = ((counts - n * (1 - p)) ** 2 / (n * p * (1 - p))).sum()
    return float((statistic - groups) / (2 * groups) ** 0.5)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_chi_square_along_every_axis(p):
    module = Dropout(p).train()
    torch.manual_seed(11)
    kept = torch.stack([module(torch.ones(8, 64, 128)) for _ in range(16)]) > 0
    exact = philox.drop_threshold(p) / 65536
    for axis in range(4):  # draws, sequences, positions, channels
        assert abs(chi_square(kept.movedim(axis, 0), exact, kept.shape[axis])) < 4
    # Neighbours: each of the four combinations as often as independence has it.
    for axis in range(4):
        a, b = kept.narrow(axis, 0, kept.shape[axis] - 1), kept.narrow(axis, 1, kept.shape[axis] - 1)
        cells = torch.stack([a & b, a & ~b, ~a & b, ~a & ~b]).flatten(1).double().sum(1)
        q = 1 - exact
        wanted = torch.tensor([q * q, q * exact, exact * q, exact * exact]).double() * a.numel()
        assert ((cells - wanted) ** 2 / wanted).sum() < 16.3  # 3 degrees of freedom, p = 0.001


def test_gradient_is_the_same_mask_and_nothing_is_saved():
    module = Dropout(0.4).train()
    x = torch.randn(2, 9, 33, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda t: t):
        out = module(x)
    assert not saved
    upstream = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, x, upstream)
    scale = philox.keep_scale(0.4)
    assert torch.equal(grad, torch.where(out != 0, upstream * scale, torch.zeros_like(out)))
    assert torch.autograd.gradcheck(lambda x: op(x.float(), 5).double(), x[0].double(), eps=1e-2, atol=1e-2)


def test_reproducible_from_the_seed_of_torch():
    module, x = Dropout(0.5).train(), torch.ones(2, 3, 50)
    torch.manual_seed(1)
    first, second = module(x), module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first)
    assert not torch.equal(first, second)


def test_positions_follow_the_packing():
    module = Dropout(0.5).train()
    lengths = [3, 5, 2]
    offsets = torch.tensor([0, 3, 8, 10], dtype=torch.int32)

    def draw(x, cu_seqlens=None, total=0):
        set_packing(cu_seqlens, total)
        torch.manual_seed(2)
        return module(x)

    padded = draw(torch.ones(3, 5, 20))
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    assert torch.equal(draw(torch.ones(1, 10, 20), offsets, 10)[0], padded[mask])
    # What is left of a last layer whose head reads first positions.
    assert torch.equal(draw(torch.ones(1, 3, 20), offsets, 10)[0], padded[:, 0])
    assert torch.equal(draw(torch.ones(3, 1, 20))[:, 0], padded[:, 0])
    assert torch.equal(draw(torch.ones(3, 20)), padded[:, 0])
    # A stale packing of other sizes is not looked at.
    assert torch.equal(draw(torch.ones(3, 5, 20), offsets, 10), padded)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_draws_the_same(reentrant):
    model = nn.Sequential(nn.Linear(8, 8), Dropout(0.5), nn.Linear(8, 8)).train()
    x = torch.randn(2, 4, 8, requires_grad=True)
    torch.manual_seed(4)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.manual_seed(4)
    out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
    torch.rand(3)
    out.square().sum().backward()
    assert torch.equal(x.grad, expected)


def test_recompute_draws_the_same():
    model = nn.Sequential(nn.Linear(8, 8), Dropout(0.5), nn.Linear(8, 8), nn.GELU()).train()
    x = torch.randn(2, 4, 8, requires_grad=True)

    def gradients():
        torch.manual_seed(4)
        return torch.autograd.grad(model(x).square().sum(), [*model.parameters(), x])

    expected = gradients()
    Recompute("all").attach(model)
    for ours, theirs in zip(gradients(), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_where_it_does_not_apply_torch_does_it():
    x = torch.randn(4, 6, requires_grad=True)
    assert Dropout(0.5).eval()(x) is x
    assert torch.equal(Dropout(0.0).train()(x), x)
    assert torch.equal(Dropout(1.0).train()(x), torch.zeros_like(x))
    assert Dropout(0.5).train()(x.double()).dtype == torch.float64
    mapped = torch.vmap(Dropout(0.5).train(), randomness="different")(torch.ones(3, 4, 50))
    assert set(mapped.unique().tolist()) == {0.0, 2.0}
    in_place = Dropout(0.5, inplace=True).train()
    y = torch.ones(4, 6)
    assert in_place(y) is y


def test_only_plain_dropouts_are_replaced_and_come_back():
    class Own(nn.Dropout):
        pass

    model = nn.Sequential(nn.Dropout(0.5), Own(0.5), nn.Dropout1d(0.5), nn.AlphaDropout(0.5), nn.Dropout(0.5))
    model[4].forward = lambda x: x
    before = [type(m) for m in model]
    calls = []
    model[0].register_forward_hook(lambda m, a, out: calls.append(out))
    replace_dropouts(model)
    assert [type(m) for m in model] == [Dropout, *before[1:]]
    model[0].train()(torch.ones(3, 4))
    assert len(calls) == 1
    model[0]._forward_hooks.clear()
    for copied in (copy.deepcopy(model[0]), pickle.loads(pickle.dumps(model[0]))):
        assert type(copied) is Dropout
    restore_dropouts(model)
    assert [type(m) for m in model] == before


def test_compiles():
    model = nn.Sequential(nn.Linear(4, 4), Dropout(0.5)).train()
    out = torch.compile(model, backend="eager", fullgraph=True)(torch.ones(3, 2, 4))
    assert (out == 0).any()


def test_op_is_registered_right():
    x = torch.randn(6, 8, requires_grad=True)
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    torch.library.opcheck(ops.hidden_dropout, (x, torch.tensor(3), offsets, 1, 0.5))
