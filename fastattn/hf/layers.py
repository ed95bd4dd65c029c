"""The layers of a model that patch lets work in another way, by their class: hooks, settings and copies of
the module stay what they are, and unpatch gives the class back.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import nn

from ..frozen import replace_dropouts, replace_linears, restore_dropouts, restore_linears
from .intermediate import replace_intermediates, restore_intermediates


def replace_layers(model: nn.Module) -> None:
    replace_dropouts(model)
    replace_linears(model)
    replace_intermediates(model)


def restore_layers(model: nn.Module) -> None:
    restore_intermediates(model)
    restore_linears(model)
    restore_dropouts(model)
    if "peft" in sys.modules:
        from ..frozen.lora import restore_loras

        restore_loras(model)


@dataclass(frozen=True)
class ReplaceAdapters:
    """Before a model: adapters may have been put in since patch, with a dropout of their own."""

    def __call__(self, model: nn.Module, args: tuple) -> None:
        if "peft" in sys.modules and not torch.compiler.is_compiling():
            from ..frozen.lora import replace_loras

            replace_loras(model)
            replace_dropouts(model)
