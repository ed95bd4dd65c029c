"""What patch has to know of each model family, looked up by config.model_type and checked against the model
itself.

A family names the places where patch touches a model. Whether they are really there, and take the arguments
they are
to be given, is checked on the model in hand: a transformers that has changed gives an UnsupportedModelError.
"""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ...errors import UnsupportedModelError


class Reads(enum.Enum):
    """Which rows of the encoder's output a model uses: what makes leaving out padding exact."""

    BARE = "every token, and the pooler or its caller the first position"
    FIRST = "the first position"
    LABELLED = "the positions whose label is not -100"
    NEXT = "the positions before those whose label is not -100"
    LAST = "the last position that is no pad token"
    EOS = "the position of the last end-of-sequence token"
    TOKENS = "the positions the attention mask keeps"
    ALL = "every position, padding too"


@dataclass(frozen=True, kw_only=True)
class Family:
    """What every family has."""

    model_type: str
    base: str  # class of the model without a head
    layers: str  # path within base to the ModuleList
    attention: str  # path within a layer to the module that calls the attention function
    heads: tuple[tuple[str, Reads], ...]  # classes of models with a head, and what they read
    wrappers: tuple[str, ...] = ()  # classes around base that hand everything on to it
    rotary: bool = False  # its attention calls apply_rotary_pos_emb: see ../rotary.py
    drops_by_function: bool = False  # hidden states, in the modeling code: no module that patch could replace

    @property
    def attends_to_encoder(self) -> bool:
        """Whether its cross-attention, if it has any, takes packed states."""
        return False

    def is_base(self, module: nn.Module) -> bool:
        return any(cls.__name__ == self.base for cls in type(module).__mro__)

    def part(self, module: nn.Module) -> Family | None:
        """What patch has to know of `module`, if it is a place where layers are run."""
        return self if self.is_base(module) else None

    def check(self, base: nn.Module) -> None:
        """Raise UnsupportedModelError unless `base` is built as this family says."""
        self._check_forward(base, "attention_mask")
        for layer in self.layer_modules(base):
            self._check_forward(layer, "hidden_states", "attention_mask")
            self._check_forward(self._child(layer, self.attention), "hidden_states", "attention_mask")

    def layer_modules(self, base: nn.Module) -> list[nn.Module]:
        """The modules that `attention` is a path in."""
        return list(self._list(base, self.layers))

    def attention_modules(self, base: nn.Module) -> list[nn.Module]:
        """The module that calls the attention function, of every layer."""
        return [self._child(layer, self.attention) for layer in self.layer_modules(base)]

    def num_layers(self, base: nn.Module) -> int:
        """How often a forward pass computes attention."""
        return len(self.layer_modules(base))

    def contiguous(self, base: nn.Module) -> bool:
        """Whether attention counts how far apart tokens lie in a row, as a window does."""
        return getattr(base.config, "sliding_window", None) is not None

    def reads(self, model: nn.Module) -> Reads | None:
        """What a model with a head reads; ALL for one not listed, None for one not transformers' own."""
        name = self.class_name(model)
        return None if name is None else dict(self.heads).get(name, Reads.ALL)

    def class_name(self, model: nn.Module) -> str | None:
        """The transformers class whose forward a model with a head has; None for a wrapper, and for a forward
        of the user's own."""
        mro = type(model).__mro__
        if not is_transformers(next(cls for cls in mro if "forward" in vars(cls))):
            return None
        name = next(filter(is_transformers, mro)).__name__
        return None if name in self.wrappers else name

    def _list(self, module: nn.Module, path: str) -> nn.ModuleList:
        layers = self._child(module, path)
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            raise self._mismatch(module, f"{path} is no list of layers")
        return layers

    def _child(self, module: nn.Module, path: str) -> nn.Module:
        for name in path.split("."):
            child = getattr(module, name, None)
            if not isinstance(child, nn.Module):
                raise self._mismatch(module, f"{type(module).__name__} has no module {name!r}")
            module = child
        return module

    def _check_forward(self, module: nn.Module, *names: str) -> None:
        parameters = forward_parameters(module)
        for name in names:
            if name not in parameters:
                raise self._mismatch(module, f"{type(module).__name__}.forward takes no {name!r}")
        if parameters[-1] != "**":
            raise self._mismatch(module, f"{type(module).__name__}.forward takes no **kwargs")

    def _mismatch(self, module: nn.Module, what: str) -> UnsupportedModelError:
        import transformers

        return UnsupportedModelError(
            f"{type(module).__name__} is not built as fastattn knows {self.model_type!r} models: {what} "
            f"(transformers {transformers.__version__})"
        )


@dataclass(frozen=True, kw_only=True)
class EncoderFamily(Family):
    """An encoder of the BERT kind: embeddings, layers from (B, N, C) to (B, N, C), then a head."""

    encoder: str  # attribute of base: the module whose forward runs the layers
    # Path within a layer to the module that first sees attention's output; None where the last layer must
    # compute every row, see first_token.py.
    after_attention: str | None

    def check(self, base: nn.Module) -> None:
        super().check(base)
        self._check_forward(self._child(base, self.encoder), "hidden_states", "attention_mask")
        self.last_attention(base)

    def last_attention(self, base: nn.Module) -> tuple[nn.Module, nn.Module] | None:
        """The last layer's attention, and the module behind it."""
        if self.after_attention is None:
            return None
        layer = self.layer_modules(base)[-1]
        return self._child(layer, self.attention), self._child(layer, self.after_attention)


@dataclass(frozen=True, kw_only=True)
class FlatFamily(Family):
    """Embeddings by position_ids, layers and a norm, all in the bare model's forward."""

    bare_reads: Reads  # what the caller of the bare model reads

    def check(self, base: nn.Module) -> None:
        super().check(base)
        self._check_forward(base, "input_ids", "inputs_embeds", "position_ids")


@dataclass(frozen=True, kw_only=True)
class DecoderFamily(FlatFamily):
    """A causal decoder, with a cache."""

    bare_reads: Reads = Reads.TOKENS
    counts_tokens: bool = False  # a position without position_ids is the number of tokens before it

    def check(self, base: nn.Module) -> None:
        super().check(base)
        self._check_forward(base, "use_cache", "past_key_values")


@dataclass(frozen=True, kw_only=True)
class VisionFamily(Family):
    """An encoder of images: no sequence is shorter than another, so there is no padding to leave out."""

    def check(self, base: nn.Module) -> None:
        self._check_forward(base, "pixel_values")
        for layer in self.layer_modules(base):
            self._check_forward(layer, "hidden_states")
            self._check_forward(self._child(layer, self.attention), "hidden_states")


def is_transformers(cls: type) -> bool:
    return cls.__module__.startswith("transformers.")


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of forward's parameters, in order, "**" last if it takes any keyword."""
    forward = type(module).forward
    # Compilers look through a cache, with a warning.
    return _parameters_of(forward) if torch.compiler.is_compiling() else _known_parameters_of(forward)


def _parameters_of(forward: Callable) -> tuple[str, ...]:
    names = []
    for parameter in inspect.signature(forward).parameters.values():
        names.append("**" if parameter.kind is parameter.VAR_KEYWORD else parameter.name)
    return tuple(names[1:])


_known_parameters_of = functools.cache(_parameters_of)


def find_family(model_type: str) -> Family | None:
    """The family of that config.model_type, if fastattn has it."""
    return _families().get(model_type)


def supported() -> tuple[str, ...]:
    """Every config.model_type that patch takes."""
    return tuple(sorted(_families()))


def _families() -> dict[str, Family]:
    from . import decoders, encoders, own_attention, seq2seq, vision

    modules = (encoders, decoders, own_attention, seq2seq, vision)
    known = [family for module in modules for family in module.FAMILIES]
    return {family.model_type: family for family in known}
