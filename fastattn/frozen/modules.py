"""Which modules are functions of one tensor and their weights alone, so that they can be run again."""

from __future__ import annotations

import enum

from torch import nn

from .linear import Linear

_LORA = f"{__package__}.lora"  # which cannot be imported without peft


class Kind(enum.Enum):
    """What running a module again costs."""

    LINEAR = "a matrix product"
    POINTWISE = "a pass over memory"


def kind_of(module: nn.Module) -> Kind | str | None:
    """The kind of a module that can be run again; a string says why a linear layer cannot; None: not a leaf.

    Classes are compared exactly: a subclass may do more than its parent.
    """
    cls = type(module)
    home, name = cls.__module__, cls.__name__
    if cls in (nn.Linear, Linear) or (name == "Conv1D" and home == "transformers.pytorch_utils"):
        return Kind.LINEAR
    if home.startswith(("peft.tuners.", _LORA)):
        if name == "Linear" and (home == _LORA or home.split(".")[2] in ("lora", "ia3")):
            return Kind.LINEAR if kind_of(module.get_base_layer()) is Kind.LINEAR else "of what it wraps"
        return "only LoRA's and IA3's linear layers are known" if hasattr(module, "base_layer") else None
    if cls in (nn.LayerNorm, nn.RMSNorm) or _is_rms_norm(home, name):
        return Kind.POINTWISE
    if _is_activation(module, home):
        return Kind.POINTWISE
    if isinstance(module, nn.Linear) or name.endswith(("Linear", "Linear4bit", "Linear8bitLt")):
        return "a linear layer of its own kind"
    return None


def _is_rms_norm(home: str, name: str) -> bool:
    return home.startswith("transformers.models.") and (name.endswith("RMSNorm") or name == "T5LayerNorm")


def _is_activation(module: nn.Module, home: str) -> bool:
    at_home = home in ("torch.nn.modules.activation", "transformers.activations")
    return at_home and not any(True for _ in module.parameters()) and not any(True for _ in module.children())
