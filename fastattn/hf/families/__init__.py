"""What patch has to know of each model family, looked up by config.model_type and checked against the model
itself.

A family names the places where patch touches a model. Whether they are really there, and take the arguments
they are
to be given, is checked on the model in hand: a transformers that has changed gives an UnsupportedModelError.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ...errors import UnsupportedModelError


class Reads(enum.Enum):
    """Which rows of the encoder's output a model uses: what makes leaving out padding exact."""

    BARE = "every token, and the pooler or its caller the first position"
    FIRST = "the first position"
    LABELLED = "the positions whose label is not -100"
    TOKENS = "the positions the attention mask keeps"
    ALL = "every position, padding too"


@dataclass(frozen=True)
class EncoderFamily:
    """An encoder of the BERT kind: embeddings, then layers that map (B, N, C) to (B, N, C), then a head."""

    model_type: str
    base: str  # class of the model without a head
    encoder: str  # attribute of base: the module whose forward runs the layers and returns last_hidden_state
    layers: str  # attribute of the encoder: the ModuleList
    attention: str  # path within a layer to the module that calls the attention function
    after_attention: str  # path within a layer to the module that first sees attention's output
    heads: tuple[tuple[str, Reads], ...]  # classes of models with a head, and what they read

    def check(self, base: nn.Module) -> None:
        """Raise UnsupportedModelError unless `base` is built as this family says."""
        encoder = self._child(base, self.encoder)
        layers = self._child(encoder, self.layers)
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            raise self._mismatch(base, f"{self.encoder}.{self.layers} is no list of layers")
        steps = [(base, ("attention_mask",)), (encoder, ("hidden_states", "attention_mask"))]
        for layer in layers:
            steps.append((layer, ("hidden_states", "attention_mask")))
            steps.append((self._child(layer, self.attention), ("hidden_states", "attention_mask")))
            self._child(layer, self.after_attention)
        for module, names in steps:
            parameters = forward_parameters(module)
            for name in names:
                if name not in parameters:
                    raise self._mismatch(base, f"{type(module).__name__}.forward takes no {name!r}")
            if parameters[-1] != "**":
                raise self._mismatch(base, f"{type(module).__name__}.forward takes no **kwargs")

    def num_layers(self, encoder: nn.Module) -> int:
        return len(getattr(encoder, self.layers))

    def last_attention(self, encoder: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The last layer's attention, and the module behind it."""
        layer = getattr(encoder, self.layers)[-1]
        return self._child(layer, self.attention), self._child(layer, self.after_attention)

    def reads(self, model: nn.Module) -> Reads | None:
        """What a model with a head reads; ALL for one not listed, None for one not transformers' own."""
        owner = next(cls for cls in type(model).__mro__ if "forward" in vars(cls))
        if not owner.__module__.startswith("transformers."):
            return None
        return dict(self.heads).get(owner.__name__, Reads.ALL)

    def _child(self, module: nn.Module, path: str) -> nn.Module:
        for name in path.split("."):
            child = getattr(module, name, None)
            if not isinstance(child, nn.Module):
                raise self._mismatch(module, f"{type(module).__name__} has no module {name!r}")
            module = child
        return module

    def _mismatch(self, module: nn.Module, what: str) -> UnsupportedModelError:
        import transformers

        return UnsupportedModelError(
            f"{type(module).__name__} is not built as fastattn knows {self.model_type!r} models: {what} "
            f"(transformers {transformers.__version__})"
        )


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of forward's parameters, in order, "**" last if it takes any keyword."""
    return _parameters_of(type(module).forward)


def _parameters_of(forward: Callable) -> tuple[str, ...]:
    names = []
    for parameter in inspect.signature(forward).parameters.values():
        names.append("**" if parameter.kind is parameter.VAR_KEYWORD else parameter.name)
    return tuple(names[1:])


def find_family(model_type: str) -> EncoderFamily | None:
    """The family of that config.model_type, if fastattn has it."""
    return _families().get(model_type)


def supported() -> tuple[str, ...]:
    """Every config.model_type that patch takes."""
    return tuple(sorted(_families()))


def _families() -> dict[str, EncoderFamily]:
    from . import encoders

    return {family.model_type: family for family in encoders.FAMILIES}
