"""What a forward pass of a model computes and keeps, counted from outside."""

from __future__ import annotations

import transformers
from torch import nn

from fastattn.finetune.measure import SavedBytes


def saved_bytes(model: nn.Module, inputs: dict) -> int:
    """What a forward pass keeps for backward, without parameters and buffers."""
    counter = SavedBytes((*model.parameters(), *model.buffers()))
    with counter.counting():
        model(**inputs)
    return counter.bytes


def rows_in_layers(model: nn.Module, inputs: dict) -> dict[str, set[int]]:
    """The numbers of rows (positions) that the linear layers are given in each list of layers, by its path.

    Those of a last layer for first positions alone and of the keys of cross-attention are among them.
    """
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    seen, handles = {}, []
    for path, layers in model.named_modules():
        if not isinstance(layers, nn.ModuleList) or any(path.startswith(f"{outer}.") for outer in seen):
            continue
        seen[path] = set()
        for module in filter(lambda module: isinstance(module, linear), layers.modules()):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, rows=seen[path]: rows.add(args[0].numel() // args[0].shape[-1])
                )
            )
    model(**inputs)
    for handle in handles:
        handle.remove()
    return {path: rows for path, rows in seen.items() if rows}
