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
from .prefix import behind_prefix, shared_prefix
from .prompt_attention import KEYWORD as PROMPT


@dataclass(frozen=True)
class EnterModel:
    """Before the bare model: what can be said without its mask."""

    options: Options
    family: EncoderFamily

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict):
        config, prefix = model.config, None
        if not getattr(config, "is_decoder", False):
            cache = argument(model, "past_key_values", args, kwargs)
            prefix = shared_prefix(model, cache, self.family.num_layers(model))
        call = begin(model, args, kwargs, self.options, self.family, Reads.BARE, prefix)
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
        new = {}
        if call.prefix is not None:
            own = behind_prefix(mask, call.prefix, hidden.shape[1])
            if own is None and mask is not None:
                call.prefix = None
            else:
                mask = own
                new = {"past_key_values": None, "attention_mask": own, PROMPT: call.prefix}
        layout = None if mask is None else call.layout_for(mask, hidden.shape[:2])
        # A hook that somebody else put here expects to see every token.
        if call.only_first and all(
            isinstance(hook, LeaveEncoder) for hook in encoder._forward_hooks.values()
        ):
            if layout is None:
                call.first = first_rows(None, hidden.device)
            elif layout.min_seqlen > 0:
                call.first = first_rows(layout.cu_seqlens, hidden.device)
        if layout is not None:
            new |= {"hidden_states": layout.pack(hidden), "attention_mask": None, **layout.keywords}
        return replace_arguments(encoder, args, kwargs, new) if new else None


@dataclass(frozen=True)
class LeaveEncoder:
    """Behind the last layer: zeros where padding was."""

    def __call__(self, encoder: nn.Module, args: tuple, kwargs: dict, output):
        call = kwargs.get(KEYWORD)
        if call is None:
            return None
        if call.prefix is not None:
            call.prefix.check_attended(encoder, call.layers)
        if call.layout is None and call.first is None:
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
