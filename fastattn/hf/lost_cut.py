"""Frozen layers below everything that trains, and what makes backward run through them all the same.

Autograd stops where nothing below needs a gradient. A hook that calls requires_grad_ on what the embeddings
return, as transformers' enable_input_require_grads does, moves that point down to the embeddings.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor, nn

from ..log import log_once


class _Word(threading.local):
    """What a bare model left for its first layer, in this thread."""

    # Nobody asked for the inputs' gradients; and no layer has run yet. Reentrant checkpointing runs the first
    # one again, on inputs that it detached.
    is_first_pass = False


_word = _Word()


def watch(args: tuple, kwargs: dict) -> None:
    """At the start of a forward pass of a bare model with these arguments."""
    _word.is_first_pass = not _needs_gradient(args, kwargs)


@dataclass(frozen=True)
class BeforeFirstLayer:
    """Says once if these layers, the first of which it is put before, are run backward for nobody."""

    layers: tuple[nn.Module, ...]

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_compiling() or not _word.is_first_pass:
            return
        _word.is_first_pass = False
        if (reason := lost_cut(self.layers, args, kwargs)) is not None:
            log_once(reason)


def lost_cut(layers: Sequence[nn.Module], args: tuple, kwargs: dict) -> str | None:
    """Why backward runs through frozen layers at the bottom of `layers` for nobody, if it does.

    args and kwargs are the first layer's. Whoever calls must know that the caller of the model asked for no
    gradient of its inputs.
    """
    hidden, *others = args or (kwargs.get("hidden_states"),)
    # Reentrant checkpointing runs layers without gradients at first; in evaluation there are none.
    if not (torch.is_grad_enabled() or layers[0].training):
        return None
    if not isinstance(hidden, Tensor) or not hidden.requires_grad:
        return None
    frozen = len(list(takewhile(lambda layer: not _trains(layer), layers)))
    kwargs = {name: x for name, x in kwargs.items() if name != "hidden_states"}
    if not frozen or _needs_gradient(others, kwargs) or not _is_made_to_need_one(hidden):
        return None
    checkpoint = getattr(layers[0], "_gradient_checkpointing_func", None)
    reentrant = getattr(layers[0], "gradient_checkpointing", False) and getattr(
        checkpoint, "keywords", {}
    ).get("use_reentrant")
    remedy = (
        'reentrant checkpointing needs that, {"use_reentrant": False} does not'
        if reentrant
        else "nothing here needs that; model.disable_input_require_grads() takes it back"
    )
    return (
        f"the first {frozen} layers train nothing, yet backward runs through them, as a hook makes the "
        f"embeddings' output require a gradient (enable_input_require_grads?): {remedy}"
    )


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _needs_gradient(args: Sequence, kwargs: dict) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values()))


def _is_made_to_need_one(hidden: Tensor) -> bool:
    """Whether what needs a gradient does so although no parameter is in its history."""
    if hidden.is_leaf:
        return not isinstance(hidden, nn.Parameter)
    seen, todo = set(), [hidden.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(getattr(node, "variable", None), nn.Parameter):
            return False
        todo += (function for function, _ in node.next_functions)
    return True
