"""Encoder-decoder models: two stacks of layers, each a model of its own, the second with cross-attention.

Padding goes where a stack begins and comes back where it ends, so either stack works alone as well (generate
runs the encoder once and the decoder often; encoder_outputs may come from the caller).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from . import Family, Reads, forward_parameters, relative


@dataclass(frozen=True, kw_only=True)
class Stack(Family):
    """The encoder or the decoder: embeds its tokens, runs its layers, ends with a norm."""

    is_decoder: bool
    cross_attention: str | None = None  # path within a layer
    positions: str | None = None  # attribute of base: what turns position_ids into embeddings
    mask: str = "attention_mask"  # the name of attention's mask argument
    relative_bias: bool = False  # T5's table: see relative.py
    fixed_length: bool = False  # its input is never padded

    @property
    def attends_to_encoder(self) -> bool:
        return self.cross_attention is not None

    def is_base(self, module: nn.Module) -> bool:
        if not super().is_base(module):
            return False
        # T5's two stacks are of one class.
        return not self.relative_bias or bool(module.config.is_decoder) == self.is_decoder

    def check(self, base: nn.Module) -> None:
        layers = self.layer_modules(base)
        self._check_forward(
            base, "attention_mask", *(() if self.fixed_length else ("input_ids", "inputs_embeds"))
        )
        if self.is_decoder:
            self._check_forward(base, "encoder_hidden_states", "past_key_values", "use_cache")
        for layer in layers:
            self._check_forward(layer, "hidden_states", "attention_mask")
            self._check_forward(self._child(layer, self.attention), "hidden_states", self.mask)
            if self.cross_attention is not None:
                cross = self._child(layer, self.cross_attention)
                self._check_forward(cross, "hidden_states", "key_value_states", self.mask)
        if self.relative_bias:
            relative.check(self._child(layers[0], self.attention))
        if self.positions is not None:
            module = self._child(base, self.positions)
            if "position_ids" not in forward_parameters(module):
                raise self._mismatch(base, f"{type(module).__name__}.forward takes no 'position_ids'")


@dataclass(frozen=True)
class Seq2SeqReads:
    """What a model reads of its two stacks. A decoder attends to the encoder's output under its mask."""

    encoder: Reads
    decoder: Reads

    @property
    def value(self) -> str:
        return f"of its encoder {self.encoder.value}; of its decoder {self.decoder.value}"


@dataclass(frozen=True)
class Seq2SeqFamily:
    """Both stacks, and the models made of them."""

    encoder: Stack
    decoder: Stack
    heads: tuple[tuple[str, Reads], ...]  # what is read of the decoder
    encoder_heads: tuple[tuple[str, Reads], ...] = ()  # models without a decoder

    @property
    def model_type(self) -> str:
        return self.encoder.model_type

    def part(self, module: nn.Module) -> Stack | None:
        """The stack that `module` is, if it is one."""
        return self.encoder.part(module) or self.decoder.part(module)

    def reads(self, model: nn.Module) -> Seq2SeqReads | None:
        """What a model that holds stacks reads of them; ALL for one not listed."""
        name = self.encoder.class_name(model)
        if name is None:
            return None
        if name in dict(self.heads):
            return Seq2SeqReads(Reads.TOKENS, dict(self.heads)[name])
        reads = dict(self.encoder_heads).get(name, Reads.ALL)
        return Seq2SeqReads(reads, reads)
