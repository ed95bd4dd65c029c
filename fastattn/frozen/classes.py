"""Modules that work in another way by their class: hooks, settings and copies of them stay what they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn


def replace_classes(
    model: nn.Module,
    ours: Mapping[type, type],
    wanted: Callable[[nn.Module], bool] = lambda module: True,
) -> None:
    """Every wanted module in it of exactly a class in `ours` gets the class there.

    One with a forward put into it keeps its own: that forward would hide ours.
    """
    for module in model.modules():
        if type(module) in ours and "forward" not in vars(module) and wanted(module):
            module.__class__ = ours[type(module)]


def restore_classes(model: nn.Module, ours: Mapping[type, type]) -> None:
    """What replace_classes has replaced gets its class back."""
    theirs = {new: old for old, new in ours.items()}
    for module in model.modules():
        if type(module) in theirs:
            module.__class__ = theirs[type(module)]
