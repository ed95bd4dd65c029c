"""The op fastattn::linear: as exact as torch, forward and backward, and what it refuses."""

import pytest
import torch
from torch.nn import functional

from fastattn.errors import InvalidArgumentError
from fastattn.frozen.product import product


def tensors(rows=(7, 9), in_features=37, out_features=48, transposed=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    x = torch.randn(*rows, in_features, generator=generator)
    return x, torch.randn(shape, generator=generator), torch.randn(out_features, generator=generator)


def by_torch(x, weight, bias, gelu, transposed):
    out = functional.linear(x, weight.t() if transposed else weight, bias)
    return functional.gelu(out) if gelu else out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [((), 5, 16), ((1,), 1, 16), ((7, 9), 37, 48), ((0,), 8, 16), ((130,), 801, 336), ((1000,), 64, 128)],
)
def test_as_exact_as_torch(sizes, with_bias, gelu, transposed):
    x, weight, bias = tensors(*sizes, transposed=transposed)
    bias = bias if with_bias else None
    out = product(x, weight, bias, gelu, transposed)
    double = (x.double(), weight.double(), None if bias is None else bias.double())
    expected = by_torch(*double, gelu, transposed)
    assert out.shape == expected.shape
    theirs = (by_torch(x, weight, bias, gelu, transposed) - expected).norm()
    assert (out - expected).norm() <= 2 * theirs + 1e-6 * expected.norm()


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_of_x(transposed):
    x, weight, bias = tensors(in_features=32, transposed=transposed)
    dout = torch.randn(7, 9, 48)
    leaves = [t.clone().requires_grad_() for t in (x, x.double())]
    product(leaves[0], weight, bias, transposed=transposed).backward(dout)
    by_torch(leaves[1], weight.double(), bias.double(), False, transposed).backward(dout.double())
    torch.testing.assert_close(leaves[0].grad.double(), leaves[1].grad, rtol=1e-5, atol=1e-5)
    grad_out = dout.clone().requires_grad_()  # a second time
    (dx,) = torch.autograd.grad(
        product(leaves[0], weight, transposed=transposed), leaves[0], grad_out, create_graph=True
    )
    (again,) = torch.autograd.grad(dx, grad_out, x)
    torch.testing.assert_close(again, product(x, weight, transposed=transposed))


def test_strides():
    x, weight, bias = tensors()
    expected = product(x, weight, bias)
    apart = torch.empty(7, 9, 74)[..., ::2].copy_(x)
    spread = torch.empty(37, 48).t().copy_(weight)
    assert product(apart, spread, torch.stack([bias, bias], 1)[:, 0]).equal(expected)
    assert product(x[0].expand(3, 9, 37), weight, bias).equal(expected[0].expand(3, 9, 48))


def test_same_bits_for_any_number_of_threads_and_any_rows():
    x, weight, bias = tensors((1200,), 64, 128)
    before, whole = torch.get_num_threads(), product(x, weight, bias, gelu=True)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert product(x, weight, bias, gelu=True).equal(whole)
    finally:
        torch.set_num_threads(before)
    assert product(x[5:311], weight, bias, gelu=True).equal(whole[5:311])


def test_opcheck():
    x, weight, bias = tensors(in_features=32)
    for arguments in (
        (x, weight, bias, True, False),
        (x.clone().requires_grad_(), weight, bias, False, False),
        (x.clone().requires_grad_(), weight.t().contiguous(), None, False, True),
    ):
        torch.library.opcheck(torch.ops.fastattn.linear.default, arguments)


def test_compiled_whole():
    x, weight, bias = tensors()
    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    assert compiled(x, weight, bias).equal(product(x, weight, bias))


@pytest.mark.parametrize(
    ("spoil", "argument"),
    [
        (lambda x, w, b: (x.double(), w, b), "x"),
        (lambda x, w, b: (x, w.bfloat16(), b), "weight"),
        (lambda x, w, b: (x[..., 1:], w, b), "weight"),
        (lambda x, w, b: (x, w[1:], b[1:]), "weight"),
        (lambda x, w, b: (x, w, b[1:]), "bias"),
        (lambda x, w, b: (x, w.requires_grad_(), b), "weight"),
        (lambda x, w, b: (x, w, b.requires_grad_()), "bias"),
        (lambda x, w, b: (x.requires_grad_(), w, b, True), "gelu"),
    ],
)
def test_refused(spoil, argument):
    with pytest.raises(InvalidArgumentError, match=argument):
        product(*spoil(*tensors()))
