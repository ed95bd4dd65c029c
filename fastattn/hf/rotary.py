"""Rotary positions in patched models: fastattn.rotary in the place of transformers' own function.

transformers' attention calls a function of its module by the name `apply_rotary_pos_emb`. The attention
modules of a patched model get a class whose forward is the very same code over the same globals but for this
one name. So no modelling code is copied, nothing of transformers is touched, and an unpatched model in the
process notices nothing.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .. import reference
from ..errors import InvalidArgumentError, UnsupportedError
from ..frozen.recorder import current
from ..log import log_once
from ..rotary import rotate

_NAME = "apply_rotary_pos_emb"


class _Rotating:
    """In front of transformers' class. Copies and pickles name that class, and make this one of it again."""

    def __reduce_ex__(self, protocol):
        _, _, *rest = super().__reduce_ex__(protocol)
        return _new, (type(self).theirs,), *rest


def _new(theirs: type) -> nn.Module:
    ours = _class_of(theirs)
    cls = theirs if isinstance(ours, str) else ours
    return cls.__new__(cls)


def replace_rotary(attentions: Iterable[nn.Module]) -> None:
    """These modules turn q and k by fastattn.rotary from now on; why one cannot is logged."""
    for attention in attentions:
        if isinstance(attention, _Rotating):
            continue
        ours = _class_of(type(attention))
        if "forward" in vars(attention):
            ours = "its forward was replaced"
        if isinstance(ours, str):
            log_once(f"rotary positions of {type(attention).__name__} are transformers' own: {ours}")
        else:
            attention.__class__ = ours


def restore_rotary(model: nn.Module) -> None:
    for module in model.modules():
        if "theirs" in vars(type(module)) and isinstance(module, _Rotating):  # not a class made of ours
            module.__class__ = type(module).theirs


def rotating(model: nn.Module) -> int:
    """How many modules in it turn q and k by fastattn.rotary."""
    return sum(isinstance(module, _Rotating) for module in model.modules())


def _class_of(theirs: type) -> type | str:
    """A subclass that turns by fastattn.rotary, or why there is none."""
    forward = theirs.forward
    function = getattr(forward, "__globals__", {}).get(_NAME)
    if function is None or _NAME not in forward.__code__.co_names:
        return f"its forward calls no {_NAME}"
    return _make_class(theirs, forward, function)


@functools.cache
def _make_class(theirs: type, forward: Callable, function: Callable) -> type | str:
    if (reason := _why_other(function)) is not None:
        return reason
    own = types.FunctionType(
        forward.__code__,
        {**forward.__globals__, _NAME: _ours(function)},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    own.__kwdefaults__ = forward.__kwdefaults__

    @functools.wraps(forward)
    def forward_of_ours(self, *args, **kwargs):
        # A compiler fuses transformers' operations by itself, with what is around them.
        return (forward if torch.compiler.is_compiling() else own)(self, *args, **kwargs)

    members = {
        "forward": forward_of_ours,
        "theirs": theirs,
        "__module__": __name__,
        "__doc__": theirs.__doc__,
    }
    return type(theirs.__name__, (_Rotating, theirs), members)


@torch.no_grad()
def _why_other(function: Callable) -> str | None:
    """Why fastattn.rotary is not what this function computes; None if it is, on a few numbers."""
    if (names := list(inspect.signature(function).parameters)[:4]) != ["q", "k", "cos", "sin"]:
        return f"{_NAME} takes ({', '.join(names)}, ...)"
    random = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), device="cpu")
    q, k, cos, sin = random(2, 3, 5, 8), random(2, 1, 5, 8), random(2, 5, 8), random(2, 5, 8)
    try:
        found = function(q, k, cos, sin)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{_NAME}: {error}"
    for ours, theirs in zip((q, k), found, strict=True):
        if not torch.allclose(reference.rotary(ours, cos, sin), theirs, atol=1e-5):
            return f"{_NAME} computes something else"
    return None


def _ours(theirs: Callable) -> Callable:
    @functools.wraps(theirs)
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, **kwargs
    ):
        turned, reason = None, "tensors or arguments of another kind"
        if type(q) is type(k) is Tensor and unsqueeze_dim == 1 and not kwargs:
            try:
                turned = rotate((q, k), cos, sin)
            except (InvalidArgumentError, UnsupportedError) as error:
                reason = error
        if turned is None:
            log_once(f"rotary positions are transformers' own: {reason}")
            return theirs(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, **kwargs)
        _offer((q, k), turned, cos, sin)
        return tuple(turned)

    return apply_rotary_pos_emb


def _offer(xs: tuple[Tensor, ...], turned: list[Tensor], cos: Tensor, sin: Tensor) -> None:
    """Attention saves q and k as turned. Where they can be computed again, so can what is made of them."""
    recorder = current()
    if recorder is None:
        return

    def again(x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return rotate((x,), cos, sin)

    for x, out in zip(xs, turned, strict=True):
        if out.requires_grad and recorder.knows(x):
            recorder.offer(out, again, x, cos, sin)
