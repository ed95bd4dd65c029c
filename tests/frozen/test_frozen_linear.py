"""Frozen linear layers with bias and GELU inside the product: where it is used, and that it is as exact."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastattn.frozen import Linear, linear, product, replace_linears, restore_linears

# AMX is what makes it fast; any CPU that oneDNN has bf16 for computes it.
pytestmark = pytest.mark.skipif(
    not (hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="oneDNN has no bf16 here",
)
ROWS = 37


@pytest.fixture(autouse=True)
def used(monkeypatch):
    """Small products are fused on every machine, in fp32 with GELU alone; the list grows with each."""
    calls, way = [], Linear.product
    monkeypatch.setattr(linear, "bf16_gains", lambda: True)
    monkeypatch.setattr(linear, "FEWEST_ROWS", 1)
    monkeypatch.setattr(product, "FEWEST_ROWS", 1)
    monkeypatch.setattr(product, "serves", lambda: True)
    monkeypatch.setattr(product, "beats_torch", lambda: False)
    monkeypatch.setattr(Linear, "product", lambda *args, **named: calls.append(named) or way(*args, **named))
    return calls


def layer(dtype=torch.bfloat16, bias=True) -> nn.Linear:
    torch.manual_seed(0)
    module = nn.Linear(32, 48, bias=bias, dtype=dtype).requires_grad_(False)
    replace_linears(module)
    return module


def inputs(*shape, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randn(*(shape or (ROWS, 32)), generator=torch.Generator().manual_seed(1)).to(dtype)


def exact(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    weight, bias = module.weight.double(), module.bias.double()
    return x.double() @ weight.T + bias


@pytest.mark.parametrize("shape", [(ROWS, 32), (3, 11, 32), (1, 32), (32,)])
def test_as_exact_as_torch(shape, used):
    module, x = layer(), inputs(*shape)
    out = module(x)
    assert used
    assert out.dtype == torch.bfloat16
    assert out.shape == (*shape[:-1], 48)
    torch_error = (nn.functional.linear(x, module.weight, module.bias) - exact(module, x)).norm()
    assert (out - exact(module, x)).norm() <= 2 * torch_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_is_as_exact_as_torch(dtype):
    module, x = layer(dtype), inputs(dtype=dtype)
    assert module.is_fused(x, gelu=True)
    expected = nn.functional.gelu(exact(module, x))
    two_passes = nn.functional.gelu(nn.functional.linear(x, module.weight, module.bias))
    out = module.product(x, gelu=True)
    assert out.dtype == dtype
    assert (out - expected).norm() <= 2 * (two_passes - expected).norm()


def test_not_contiguous(used):
    module, x = layer(), inputs(32, ROWS).T
    torch.testing.assert_close(module(x), module(x.contiguous()), rtol=0, atol=0)
    assert len(used) == 2


def test_autocast(used):
    module, x = layer(torch.float32), inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
        assert used
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, nn.functional.linear(x, module.weight, module.bias))


def test_float32_for_gelu_alone_where_torch_has_avx512(used, monkeypatch):
    module, x = layer(torch.float32), inputs(dtype=torch.float32)
    assert module(x).equal(nn.functional.linear(x, module.weight, module.bias))
    assert not used
    assert module.is_fused(x, gelu=True)
    assert not module.is_fused(x.clone().requires_grad_(), gelu=True)
    monkeypatch.setattr(product, "beats_torch", lambda: True)
    for setting in ("high", "medium"):
        torch.set_float32_matmul_precision(setting)
        try:
            assert not module.is_fused(x, gelu=True)
            assert not module.is_fused(x)
        finally:
            torch.set_float32_matmul_precision("highest")
    assert module.is_fused(x)


@pytest.mark.parametrize("bias", [True, False])
def test_float32_where_it_beats_torch(bias, used, monkeypatch):
    """Also where gradients pass: with the same bits with gradients on and off, as recompute needs them."""
    monkeypatch.setattr(product, "beats_torch", lambda: True)
    module, x = layer(torch.float32, bias), inputs(dtype=torch.float32)
    leaf = x.clone().requires_grad_()
    out = module(leaf)
    assert len(used) == 1
    out.square().sum().backward()
    with torch.no_grad():
        assert module(leaf).equal(out)
    double = x.double().requires_grad_()
    nn.functional.linear(
        double, module.weight.double(), module.bias.double() if bias else None
    ).square().sum().backward()
    torch.testing.assert_close(leaf.grad.double(), double.grad, rtol=1e-5, atol=1e-5)
    module.weight.requires_grad_()
    used.clear()
    module(leaf)
    assert not used


def test_weights_may_change(used):
    """Nothing is kept of them."""
    module, x = layer(), inputs()
    before = module(x)
    module.load_state_dict({name: 2 * value for name, value in module.state_dict().items()})
    torch.testing.assert_close(module(x), 2 * before, rtol=0, atol=0)
    module.weight.data = torch.zeros_like(module.weight)
    module.bias = nn.Parameter(torch.ones(48, dtype=torch.bfloat16), requires_grad=False)
    assert module(x).eq(1).all()
    assert len(used) == 3
    assert module.float()(x.float()).dtype == torch.float32
    assert len(used) == 3


def test_where_it_is_not_used(used):
    module, x = layer(), inputs()
    expected = nn.functional.linear(x, module.weight, module.bias)
    assert module(x.clone().requires_grad_()).equal(expected)
    with torch.no_grad():  # so that recompute, which runs it so, gets the same bits
        assert module(x.clone().requires_grad_()).equal(expected)
    for parameter in module.parameters():
        parameter.requires_grad_()
        assert module(x).equal(expected)
        parameter.requires_grad_(False)
    assert torch.func.vmap(module)(x).shape == expected.shape
    assert torch.compile(module, backend="eager", fullgraph=True)(x).equal(expected)
    layer(bias=False)(x)
    layer(torch.float32)(inputs(dtype=torch.float32))
    linear.FEWEST_ROWS = ROWS + 1
    module(x)
    assert not used


def test_errors_stay_torchs():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer()(inputs(ROWS, 28))
    with pytest.raises(RuntimeError, match="dtype"):
        layer()(inputs(dtype=torch.float32))


def test_there_and_back(used):
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 2, bias=False), nn.Linear(48, 32))
    model = model.to(torch.bfloat16).requires_grad_(False)
    model[2].forward = model[2].forward  # somebody else's
    state = copy.deepcopy(model.state_dict())
    replace_linears(model)
    assert [type(module) for module in model] == [Linear, Linear, nn.Linear]
    for other in (copy.deepcopy(model[0]), pickle.loads(pickle.dumps(model[0]))):
        assert type(other) is Linear
        assert other(inputs()).equal(model[0](inputs()))
    assert len(used) == 4
    restore_linears(model)
    assert all(type(module) is nn.Linear for module in model)
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())


def test_nothing_on_machines_that_do_not_gain(monkeypatch):
    monkeypatch.setattr(linear, "bf16_gains", lambda: False)
    monkeypatch.setattr(product, "serves", lambda: False)
    assert type(layer()) is nn.Linear
