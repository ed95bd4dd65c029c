"""LoRA on a frozen linear layer in three products: peft's numbers and gradients, and where it is not used."""

import copy
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
import peft
from peft.tuners import lora as theirs

from fastattn.frozen import lora

NAMES = ("x", "a", "b")


@pytest.fixture(autouse=True)
def used(monkeypatch):
    calls, apply = [], lora._Product.apply
    monkeypatch.setattr(lora._Product, "apply", lambda *args: calls.append(args) or apply(*args))
    return calls


@pytest.fixture
def said(monkeypatch) -> list[str]:
    messages = []
    monkeypatch.setattr(lora, "log_once", messages.append)
    return messages


class Model(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.linear = nn.Linear(29, 43, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def adapted(dtype=torch.float32, adapter_dtype=None, bias=True, **settings):
    """peft's model, and what is adapted in it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        **{"r": 5, "lora_alpha": 7, "target_modules": ["linear"], "init_lora_weights": False, **settings}
    )
    model = peft.get_peft_model(Model(bias).to(dtype), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapter_dtype or dtype)
    return model, model.base_model.model.linear


def inputs(*shape, dtype=torch.float32) -> torch.Tensor:
    x = torch.randn(*(shape or (3, 11, 29)), generator=torch.Generator().manual_seed(1))
    return x.to(dtype).requires_grad_()


def run(model: nn.Module, layer: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, and the gradients of what trains, for one gradient of the output."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    out = model(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    grads = torch.autograd.grad(out, (x, a, b), grad)
    assert [g.dtype for g in grads] == [x.dtype, a.dtype, b.dtype]
    return {"out": out.detach(), **dict(zip(NAMES, grads, strict=True))}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 11, 29), (7, 29), (29,), (0, 29)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pefts_numbers(dtype, shape, bias, used):
    model, layer = adapted(dtype, bias=bias, use_rslora=True)
    x = inputs(*shape, dtype=dtype)
    expected = run(model, layer, x)
    lora.replace_loras(model)
    result = run(model, layer, x)
    assert len(used) == 1
    for name, value in result.items():
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance, msg=name)
    again = run(model, layer, x)
    assert all(value.equal(again[name]) for name, value in result.items())


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_bf16(adapter_dtype, used):
    """Against the same weights in fp64: no further off than peft is where its adapters are bf16, as is usual
    under autocast."""
    model, layer = adapted(torch.bfloat16, torch.bfloat16)
    x = inputs(64, 29, dtype=torch.bfloat16)
    theirs_ = run(model, layer, x)
    double = copy.deepcopy(model).double()
    exact = run(double, double.base_model.model.linear, x.detach().double().requires_grad_())
    layer.lora_A.to(adapter_dtype)
    layer.lora_B.to(adapter_dtype)
    lora.replace_loras(model)
    result = run(model, layer, x)
    assert len(used) == 1
    for name, value in result.items():
        error, allowed = ((v.double() - exact[name]).abs().max() for v in (value, theirs_[name]))
        assert error <= 1.5 * allowed, name


def test_dropout_and_what_is_saved(used):
    model, layer = adapted(lora_dropout=0.4)
    x = inputs()
    torch.manual_seed(3)
    expected = run(model, layer, x)
    lora.replace_loras(model)
    torch.manual_seed(3)
    result = run(model, layer, x)
    for name, value in result.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    assert len(used) == 1

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        model.eval()(x)
    kept = {t.untyped_storage().data_ptr() for t in saved if t is not None and t.numel() >= x.numel()}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert kept - parameters == {x.untyped_storage().data_ptr()}


@pytest.mark.parametrize("frozen", NAMES)
def test_only_what_trains_gets_gradients(frozen):
    model, layer = adapted()
    lora.replace_loras(model)
    x = inputs()
    full = run(model, layer, x)
    tensors = dict(
        zip(NAMES, (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight), strict=True)
    )
    tensors[frozen].requires_grad_(False)
    grad = torch.randn(full["out"].shape, generator=torch.Generator().manual_seed(2))
    model(x).backward(grad)
    for name, tensor in tensors.items():
        assert tensor.grad is None if name == frozen else tensor.grad.equal(full[name])


def test_weights_may_change():
    """Nothing is kept of them between steps; within one, a change is an error as ever."""
    model, layer = adapted()
    plain = copy.deepcopy(model)
    lora.replace_loras(model)
    x = inputs()
    model(x)
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    for m in (model, plain):
        m.load_state_dict(state)
        m.base_model.model.linear.scaling["default"] = 0.3
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)
    for m in (model, plain):
        m.merge_adapter()
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    model.unmerge_adapter()
    out = model(x)
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def _hook(model, layer):
    layer.lora_A["default"].register_forward_hook(lambda *_: None)


def _second_adapter(model, layer):
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["linear"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


def _disabled(model, layer):
    layer.enable_adapters(False)


def _merged(model, layer):
    model.merge_adapter()


def _trained_base(model, layer):
    layer.base_layer.weight.requires_grad_()


def _trained_bias(model, layer):
    layer.base_layer.bias.requires_grad_()


CHANGES = {
    _hook: "hooks inside it",
    _second_adapter: "several adapters",
    _disabled: None,
    _merged: None,
    _trained_base: "is trained",
    _trained_bias: "is trained",
}


@pytest.mark.parametrize("change", CHANGES)
def test_pefts_own_way(change, used, said):
    model, layer = adapted()
    change(model, layer)
    _same_without(model, inputs(), used)
    assert said == [] if CHANGES[change] is None else CHANGES[change] in said[0]


@pytest.mark.parametrize(
    ("settings", "reason"), [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "has a bias")]
)
def test_pefts_own_variants(settings, reason, used, said):
    model, _ = adapted(**settings)
    _same_without(model, inputs(), used)
    assert reason in said[0]


def test_pefts_own_way_under_autocast_and_compile(used):
    model, layer = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        _same_without(model, inputs(), used)
    lora.replace_loras(model)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs()), theirs.Linear.forward(layer, inputs()))
    assert not used


def _same_without(model, x, used):
    expected = model(x)
    lora.replace_loras(model)
    assert model(x).equal(expected)
    assert not used


def test_there_and_back():
    model, layer = adapted()
    text, state = repr(model), model.state_dict()
    lora.replace_loras(model)
    assert type(layer) is lora.Linear
    assert repr(model) == text
    assert model.state_dict().keys() == state.keys()
    x = inputs()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(layer))):
        assert other(x).equal(model(x))
    unloaded = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(unloaded(x), model(x), rtol=1e-4, atol=1e-5)
    assert type(unloaded.linear) is nn.Linear
    lora.restore_loras(model)
    assert type(layer) is theirs.Linear


def test_no_second_derivatives():
    model, _ = adapted()
    lora.replace_loras(model)
    x = inputs()
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
