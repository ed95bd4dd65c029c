"""The padding-free encoder: between the embeddings and the head, only real tokens exist.

Padding goes before the first layer. Behind the last, and in every entry of output_hidden_states, zeros are
put in its place.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..errors import UnsupportedModelError
from ..frozen import CloseRecorder
from .call import KEYWORD, Options, argument, begin, pad_output, replace_arguments
from .families import EncoderFamily, Reads
from .first_token import first_rows


@dataclass(frozen=True)
class EnterModel:
    """Before the bare model: what can be said without its mask."""

    options: Options
    family: EncoderFamily

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict):
        call = begin(model, args, kwargs, self.options, self.family, Reads.BARE)
        config = model.config
        if call.refusal is None and getattr(config, "is_decoder", False):
            call.refusal = "the encoder runs as a decoder"
        if call.refusal is None and config.chunk_size_feed_forward:
            call.refusal = "chunk_size_feed_forward cuts the sequence into equal parts"
        call.only_first = (
            call.reads is Reads.FIRST
            and self.family.after_attention is not None
            and call.refusal is None
            and not kwargs.get("output_hidden_states", config.output_hidden_states)
            and all(isinstance(hook, (LeaveModel, CloseRecorder)) for hook in model._forward_hooks.values())
        )
        return args, {**kwargs, KEYWORD: call}


@dataclass(frozen=True)
class LeaveModel:
    """Behind it: hidden states that were recorded between the layers get their padding back."""

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict, output):
        layout = kwargs[KEYWORD].layout
        return None if layout is None else pad_output(layout, output)


@dataclass(frozen=True)
class EnterEncoder:
    """Before the first layer: padding goes."""

    def __call__(self, encoder: nn.Module, args: tuple, kwargs: dict):
        call = kwargs.get(KEYWORD)
        if call is None:
            return None
        hidden = argument(encoder, "hidden_states", args, kwargs)
        mask = argument(encoder, "attention_mask", args, kwargs)
        layout = None if mask is None else call.layout_for(mask, hidden.shape[:2])
        # A hook that somebody else put here expects to see every token.
        if call.only_first and all(
            isinstance(hook, LeaveEncoder) for hook in encoder._forward_hooks.values()
        ):
            if layout is None:
                call.first = first_rows(None, hidden.device)
            elif layout.min_seqlen > 0:
                call.first = first_rows(layout.cu_seqlens, hidden.device)
        if layout is None:
            return None
        new = {"hidden_states": layout.pack(hidden), "attention_mask": None, **layout.keywords}
        return replace_arguments(encoder, args, kwargs, new)


@dataclass(frozen=True)
class LeaveEncoder:
    """Behind the last layer: zeros where padding was."""

    def __call__(self, encoder: nn.Module, args: tuple, kwargs: dict, output):
        call = kwargs.get(KEYWORD)
        if call is None or (call.layout is None and call.first is None):
            return None
        if call.layout is not None:
            call.check_attended(encoder)
        hidden = output.last_hidden_state
        if call.first is None:
            output.last_hidden_state = call.layout.pad(hidden)
            return output
        if hidden.shape[1] != len(call.first.rows):
            raise UnsupportedModelError(
                f"the last layer of {type(encoder).__name__} returned {hidden.shape[1]} rows where "
                f"{len(call.first.rows)} were asked for; patch(model, padding_free=False) works without"
            )
        # (B, 1, C): all that the head will read.
        output.last_hidden_state = hidden if call.layout is None else hidden.transpose(0, 1)
        return output
