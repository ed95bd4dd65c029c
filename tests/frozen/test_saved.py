"""What stands in for saved tensors: right values, right lifetimes, and errors where those cannot be had."""

import gc
import weakref

import pytest
import torch
from torch import nn

from fastattn.errors import ChangedTensorError
from fastattn.frozen.recompute import Recompute


class Block(nn.Module):
    """x -> linear -> activation -> frozen linear: the activation saves what the first linear returns."""

    def __init__(self, activation: nn.Module | None = None):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 20)
        self.act = activation or nn.GELU()
        self.down = nn.Linear(20, 6)

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def stack(*activations) -> Stack:
    torch.manual_seed(0)
    model = Stack(*(Block(activation) for activation in activations or (None, None)))
    model.requires_grad_(False)
    model.blocks[0].norm.weight.requires_grad_(True)
    return model


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(model(x).square().sum(), [*trained, x]))


def saved(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that reach the saved-tensor hooks of whoever calls the model, each storage once."""
    weights = {p.data_ptr() for p in model.parameters()}
    storages = {}

    def note(tensor):
        if tensor.data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    return sum(storages.values())


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def x(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, lambda: nn.ReLU(inplace=True)])
def test_gradients_are_the_same_to_the_bit(activation):
    model = stack(activation(), activation())
    expected, bytes_before = gradients(model, x()), saved(model, x())
    recompute = Recompute("all").attach(model)
    assert equal(gradients(model, x()), expected)
    assert saved(model, x()) <= bytes_before
    recompute.detach()
    assert saved(model, x()) == bytes_before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_only_inputs_of_norms_and_statistics_are_kept():
    model = stack()
    Recompute("all").attach(model)
    per_row = 6 + 2  # x, and the norm's mean and its inverse deviation
    # The trained norm weight needs nothing more: its input is what every norm saves.
    assert saved(model, x()) == 2 * 5 * per_row * 4


def test_a_composed_activation_keeps_none_of_its_steps():
    from_transformers = pytest.importorskip("transformers.activations")
    model = stack(from_transformers.NewGELUActivation(), from_transformers.QuickGELUActivation())
    expected, bytes_before = gradients(model, x()), saved(model, x())
    Recompute("all").attach(model)
    assert equal(gradients(model, x()), expected)
    assert saved(model, x()) == 2 * 5 * 8 * 4 < bytes_before / 5


def test_auto_stays_within_its_budget():
    model = stack(*[None] * 4)
    recompute = Recompute("auto").attach(model)
    model(x())
    chosen = [site for site in recompute.sites if site.chosen and site.needed]
    spent, step = sum(s.flops for s in chosen), sum(s.step_flops for s in recompute.sites)
    assert 0 < spent <= 0.15 * step
    left_out = [site for site in recompute.sites if site.needed and not site.chosen]
    assert left_out
    assert all(spent + site.flops > 0.15 * step for site in left_out)
    everything = stack(*[None] * 4)
    Recompute("all").attach(everything)
    assert saved(everything, x()) < saved(model, x()) < saved(stack(*[None] * 4), x())


@pytest.mark.parametrize("what", ["weight", "x"])
def test_a_change_between_forward_and_backward_is_an_error(what):
    model, inputs = stack(), x()
    Recompute("all").attach(model)
    hidden = inputs * 1
    loss = model(hidden).sum()
    with torch.no_grad():
        (model.blocks[1].up.weight if what == "weight" else hidden).add_(1)
    with pytest.raises(ChangedTensorError, match="modified in place"):
        loss.backward()


def test_a_value_changed_in_place_before_it_is_saved_is_kept():
    """The offer is about what the module returned, not about what became of it."""

    class Doubled(Block):
        def forward(self, x):
            up = self.up(x)
            return self.act(up.mul_(2))

    torch.manual_seed(0)
    model = Stack(Doubled()).requires_grad_(False)
    inputs = x()
    (expected,) = torch.autograd.grad(model(inputs).sum(), inputs)
    Recompute("all").attach(model)
    (ours,) = torch.autograd.grad(model(inputs).sum(), inputs)
    assert torch.equal(ours, expected)


def test_memory_of_one_tensor_given_to_another_is_not_mistaken_for_it():
    """Allocators reuse addresses at once: an offer must not outlive what was offered."""

    class Reusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.GELU()

        def forward(self, x):
            for step in range(8):
                address = self.a(x).data_ptr()
                other = x * (step + 1)  # likely at the same address
                x = x + self.b(other) + 0 * address
            return x

    torch.manual_seed(0)
    model = Reusing().requires_grad_(False)
    inputs = torch.randn(32, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(model(inputs).sum(), inputs)
    Recompute("all").attach(model)
    (ours,) = torch.autograd.grad(model(inputs).sum(), inputs)
    assert torch.equal(ours, expected)


def test_what_nobody_saves_dies_during_the_pass():
    model = stack()
    Recompute("all").attach(model)
    outputs = []
    model.blocks[0].down.register_forward_hook(lambda m, a, out: outputs.append(weakref.ref(out)))
    model.blocks[1].register_forward_pre_hook(lambda m, a: outputs.append(outputs[0]() is None))
    loss = model(x()).sum()
    gc.collect()
    assert outputs[1] is True
    loss.backward()


def test_the_callers_own_hooks_see_what_is_kept_and_give_it_back():
    model = stack()
    expected = gradients(model, x())
    Recompute("all").attach(model)
    moved = []

    def away(tensor):
        moved.append(tensor.clone())
        return len(moved) - 1

    with torch.autograd.graph.saved_tensors_hooks(away, moved.__getitem__):
        result = gradients(model, x())
    assert equal(result, expected)
    with torch.autograd.graph.save_on_cpu():
        assert equal(gradients(model, x()), expected)


def test_backward_twice():
    model, inputs = stack(), x()
    Recompute("all").attach(model)
    loss = model(inputs).square().sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert equal(torch.autograd.grad(loss, inputs, retain_graph=True), first)


def test_second_derivatives():
    model, inputs = stack(nn.SiLU(), nn.SiLU()), x()

    def second():
        (first,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(first.square().sum(), inputs)

    expected = second()
    Recompute("all").attach(model)
    assert equal(second(), expected)


def test_an_exception_in_forward_leaves_nothing_behind():
    class Fails(nn.Module):
        def forward(self, x):
            raise KeyError("forward")

    model = Stack(Block(), Fails())
    Recompute("all").attach(model)
    with pytest.raises(KeyError):
        model(x())
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    model.blocks[1] = Block()
    model(x()).sum().backward()


def test_modules_with_a_forward_of_their_own_are_left_alone():
    model = stack()
    expected = gradients(model, x())
    up = model.blocks[0].up
    calls = []
    plain = up.forward
    up.forward = lambda x: (calls.append(1), plain(x))[1]
    Recompute("all").attach(model)
    assert equal(gradients(model, x()), expected)
    assert len(calls) == 1


@pytest.mark.parametrize("prepend", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_foreign_hooks_run_once_and_count(when, prepend):
    def change(model):
        model.blocks[0].up.register_forward_hook(lambda m, a, out: out * 3, prepend=prepend)
        model.blocks[1].up.register_forward_pre_hook(lambda m, a: (a[0] * 2,), prepend=prepend)

    calls = []
    model, other = stack(), stack()
    change(other)
    expected = gradients(other, x())
    if when == "before":
        change(model)
    Recompute("all").attach(model)
    if when == "after":
        change(model)
    model.blocks[0].up.register_forward_hook(lambda m, a, out: calls.append(1))
    assert equal(gradients(model, x()), expected)
    assert len(calls) == 1


def test_a_call_with_more_than_x_is_not_repeated_without():
    class Shifted(nn.Linear):
        def forward(self, x, shift=0.0):
            return super().forward(x) + shift

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = Shifted(6, 20)

        def forward(self, x):
            return nn.functional.gelu(self.up(x, shift=1.0))

    torch.manual_seed(0)
    model = Block().requires_grad_(False)
    expected = gradients(model, x())
    recompute = Recompute("all").attach(model)
    assert equal(gradients(model, x()), expected)
    recompute.detach()
    Shifted.__module__, Shifted.__name__ = "peft.tuners.lora.layer", "Linear"
    Shifted.get_base_layer = lambda self: nn.Linear(1, 1)
    Recompute("all").attach(model)
    assert equal(gradients(model, x()), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    class Checkpointed(Stack):
        def forward(self, x):
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=reentrant)
            return x

    model = stack()
    expected = gradients(model, x())
    model.__class__ = Checkpointed
    Recompute("all").attach(model)
    inputs = x()
    model(inputs).square().sum().backward()
    assert torch.equal(inputs.grad, expected[-1])


def test_autocast():
    def run(model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(inputs).float().square().sum()
        return torch.autograd.grad(loss, inputs)

    model, inputs = stack(), x()
    expected = run(model)
    Recompute("all").attach(model)
    assert equal(run(model), expected)


def test_func_transforms_go_without():
    model = stack()
    expected = gradients(model, x())[-1]
    Recompute("all").attach(model)
    ours = torch.func.grad(lambda x: model(x).square().sum())(x().detach())
    torch.testing.assert_close(ours, expected)
