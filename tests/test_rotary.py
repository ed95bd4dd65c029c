"""fastattn::rotary: the formula of transformers, its gradient, and every way to call an op of torch."""

import pytest
import torch

from fastattn import dispatch, reference
from fastattn.errors import InvalidArgumentError, UnsupportedError
from fastattn.rotary import _op, rotate

pytestmark = pytest.mark.usefixtures("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def transformers_own(x, cos, sin):
    """modeling_phi3.apply_rotary_pos_emb, for one of q and k."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    half = turned.shape[-1] // 2
    other = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    return torch.cat([(turned * cos) + (other * sin), rest], dim=-1)


def angles(batch, seqlen, dim, dtype=torch.float32, scaling=1.0):
    """As a model makes them: both halves alike, cast to its dtype."""
    frequencies = 10000.0 ** -(torch.arange(0, dim, 2) / max(dim, 1))
    positions = torch.randint(0, 500, (batch, seqlen, 1))
    angle = torch.cat((positions * frequencies,) * 2, -1)
    return (angle.cos() * scaling).to(dtype), (angle.sin() * scaling).to(dtype)


def projected(batch, heads, seqlen, dim, dtype):
    """(B, H, N, D) as a projection makes it: a transposed view."""
    return torch.randn(batch, seqlen, heads, dim).to(dtype).transpose(1, 2)


def check(q, k, cos, sin):
    """Forward and backward, against float64 and against PyTorch in the same dtype."""
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    found = rotate((q, k), cos, sin)
    upstream = [torch.randn_like(x) for x in found]
    gradients = torch.autograd.grad(found, (q, k), upstream)
    for x, out, up, gradient in zip((q, k), found, upstream, gradients, strict=True):
        assert out.dtype == gradient.dtype == x.dtype
        exact_x, plain_x = x.detach().double().requires_grad_(), x.detach().requires_grad_()
        exact = transformers_own(exact_x, cos.double(), sin.double())
        plain = transformers_own(plain_x, cos, sin).to(x.dtype)
        (exact_gradient,) = torch.autograd.grad(exact, exact_x, up.double())
        (plain_gradient,) = torch.autograd.grad(plain, plain_x, up)
        for ours, theirs, truth in ((out, plain, exact), (gradient, plain_gradient, exact_gradient)):
            floor = torch.finfo(x.dtype).eps * truth.abs().max() if truth.numel() else 0.0
            limit = 2 * (theirs - truth).abs().amax() + floor if truth.numel() else floor
            assert truth.numel() == 0 or (ours - truth).abs().max() <= limit
            assert ours.shape == truth.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table", ["own", "fp32"])
@pytest.mark.parametrize(
    ("dim", "rotary_dim"),
    [(2, 2), (32, 32), (34, 34), (64, 64), (80, 32), (96, 96), (128, 128), (256, 256), (7, 4)],
)
def test_numbers(poisoned, dtype, table, dim, rotary_dim):
    dtype_of_table = dtype if table == "own" else torch.float32
    for batch_of_table in (1, 3):
        cos, sin = angles(batch_of_table, 9, rotary_dim, dtype_of_table, 1.2)
        check(projected(3, 4, 9, dim, dtype), projected(3, 2, 9, dim, dtype), cos, sin)


def test_halves_that_differ_and_the_reference():
    """Nothing in the formula asks for equal halves; the gradient must be the transpose all the same."""
    cos, sin = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    check(torch.randn(2, 3, 5, 10), torch.randn(2, 3, 5, 10), cos, sin)
    x = torch.randn(2, 3, 5, 10)
    for transposed in (False, True):
        torch.testing.assert_close(
            rotate((x,), cos, sin, transposed)[0], reference.rotary(x, cos, sin, transposed)
        )


@pytest.mark.parametrize("threads", [1, 3])
def test_layouts(poisoned, threads):
    """Slices of one projection, expanded heads, strided columns, no position at all."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cos, sin = angles(1, 300, 32)
        packed = torch.randn(2, 300, 8 * 32)
        q, k = (part.unflatten(-1, (-1, 32)).transpose(1, 2) for part in packed.split((5 * 32, 3 * 32), -1))
        check(q, k, cos, sin)
        check(q[:, :1].expand(-1, 4, -1, -1), k[:, :, :, :1].expand(-1, -1, -1, 32), cos, sin)
        check(
            torch.randn(2, 3, 32, 300).mT,
            torch.randn(2, 3, 300, 64)[..., ::2],
            cos.expand(2, -1, -1),
            sin.expand(2, -1, -1),
        )
        check(q[:, :, :0], k[:, :, :0], cos[:, :0], sin[:, :0])
        check(q[:0], k[:0], cos, sin)
    finally:
        torch.set_num_threads(before)


def test_nothing_but_the_angles_is_saved_and_only_what_is_wanted_is_computed(cpu, monkeypatch):
    q, k = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 1, 5, 8)
    cos, sin = angles(1, 5, 8)
    saved, turned = [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        q_out, k_out = rotate((q, k), cos, sin)
    assert sorted(t.data_ptr() for t in saved) == sorted(t.data_ptr() for t in (cos, sin))
    monkeypatch.setattr(
        cpu, "rotary", lambda xs, *rest, own=cpu.rotary: (turned.append(len(xs)), own(xs, *rest))
    )
    k_out.sum()
    (q_out.square().sum() + k_out.square().sum()).backward()
    assert turned == [1]
    torch.testing.assert_close(q.grad, 2 * q.detach(), atol=1e-5, rtol=1e-5)  # a rotation keeps lengths


def test_second_derivative_and_gradcheck():
    cos, sin = angles(2, 3, 4)

    def turned(q, k):
        return tuple(x.double() for x in rotate((q.float(), k.float()), cos, sin))

    q, k = (torch.randn(2, heads, 3, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 1))
    assert torch.autograd.gradcheck(turned, (q, k), eps=1e-2, atol=1e-3)
    assert torch.autograd.gradgradcheck(turned, (q, k), eps=1e-2, atol=1e-3)


@pytest.mark.parametrize("count", [1, 2])
def test_op_is_registered_right(count):
    xs = [projected(2, 3, 5, 8, torch.float32).requires_grad_() for _ in range(count)]
    torch.library.opcheck(_op, (xs, *angles(1, 5, 8), False))
    torch.library.opcheck(_op, ([x.detach().mT.contiguous().mT for x in xs], *angles(2, 5, 8), True))


def test_compiles():
    q, k = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 1, 5, 8, requires_grad=True)
    cos, sin = angles(1, 5, 8)

    def loss(q, k):
        return sum(x.square().mean() for x in rotate((q * 2, k), cos, sin))

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(
        torch.autograd.grad(compiled(q, k), (q, k)), torch.autograd.grad(loss(q, k), (q, k)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_autocast_leaves_dtypes_alone():
    q, k = torch.randn(2, 3, 5, 8).bfloat16(), torch.randn(2, 1, 5, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {x.dtype for x in rotate((q, k), *angles(1, 5, 8))} == {torch.bfloat16}
        assert rotate((q.float(),), *angles(1, 5, 8))[0].dtype == torch.float32


def test_function_transforms():
    q, k = torch.randn(4, 2, 3, 5, 8), torch.randn(2, 4, 1, 5, 8)
    cos, sin = angles(1, 5, 8)
    tables = torch.stack([cos, cos * 2, cos * 3, cos * 4])

    def turned(q, k, cos):
        return torch.cat(rotate((q, k), cos, sin), 1)

    for tables_dim, cos_given in ((None, cos), (0, tables)):
        dims = (0, 1, tables_dim)
        expected = torch.stack(
            [turned(q[i], k[:, i], cos_given if tables_dim is None else tables[i]) for i in range(4)]
        )
        torch.testing.assert_close(torch.vmap(turned, dims)(q, k, cos_given), expected)
    shared = torch.vmap(turned, (0, None, None))(q, k[:, 0], cos)
    torch.testing.assert_close(shared, torch.stack([turned(x, k[:, 0], cos) for x in q]))

    def loss(q, k, cos):
        return turned(q, k, cos).pow(3).sum()

    def reference_loss(q, k, cos):
        return torch.cat([reference.rotary(x, cos, sin) for x in (q, k)], 1).pow(3).sum()

    expected = torch.stack([torch.func.grad(reference_loss)(q[i], k[:, i], cos) for i in range(4)])
    one_by_one = torch.stack([torch.func.grad(loss)(q[i], k[:, i], cos) for i in range(4)])
    torch.testing.assert_close(one_by_one, expected)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss), (0, 1, None))(q, k, cos), expected)


def bad(**changes):
    given = {
        "q": torch.randn(2, 4, 5, 8),
        "k": torch.randn(2, 2, 5, 8),
        "cos": torch.randn(1, 5, 8),
        "sin": torch.randn(1, 5, 8),
    }
    return given | changes


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"q": torch.randn(4, 5, 8)}, "q"),
        ({"q": torch.randn(2, 4, 5, 260), "k": torch.randn(2, 4, 5, 260)}, "q"),
        ({"q": torch.randn(2, 4, 5, 8, dtype=torch.float64)}, "q"),
        ({"k": torch.randn(2, 2, 6, 8)}, "k"),
        ({"k": torch.randn(2, 2, 5, 8).half()}, "q"),
        ({"cos": torch.randn(3, 5, 8)}, "cos"),
        ({"cos": torch.randn(1, 5, 9), "sin": torch.randn(1, 5, 9)}, "cos"),
        ({"cos": torch.randn(1, 5, 7), "sin": torch.randn(1, 5, 7)}, "cos"),
        ({"cos": torch.randn(1, 5, 0), "sin": torch.randn(1, 5, 0)}, "cos"),
        ({"cos": torch.randn(1, 5, 8).half()}, "cos"),
        ({"sin": torch.randn(1, 5, 6)}, "sin"),
        ({"sin": torch.randn(2, 5, 8)}, "sin"),
        ({"cos": torch.randn(1, 5, 8, device="meta")}, "cos"),
        ({"cos": torch.randn(1, 5, 8, requires_grad=True)}, "cos"),
    ],
)  # fmt: skip
def test_bad_input(changes, name):
    given = bad(**changes)
    with pytest.raises(InvalidArgumentError) as error:
        rotate((given["q"], given["k"]), given["cos"], given["sin"])
    assert name in error.value.argument


def test_a_backend_that_is_not_there(monkeypatch):
    monkeypatch.setitem(dispatch._backends, "cpu", "not built")
    given = bad()
    with pytest.raises(UnsupportedError, match="not built"):
        rotate((given["q"], given["k"]), given["cos"], given["sin"])
