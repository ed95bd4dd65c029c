"""The stacks of an encoder-decoder model without padding.

Padding goes before a stack's embeddings and comes back, as zeros, behind its last norm. The decoder packs the
encoder's states too, by their own mask, so its cross-attention has no padding on either side. In training a
decoder without a mask of its own ends each sample where the head last reads: what lies behind it is seen by
nobody. A decoder that uses a cache keeps its padding.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import UnsupportedModelError
from ..frozen import set_packing
from .call import KEYWORD, Call, Options, argument, begin, pad_output, replace_arguments
from .decoder import PER_TOKEN, pack_tokens, positions, uses_cache
from .families import Reads, forward_parameters, relative
from .families.stacks import Seq2SeqReads, Stack
from .packing import Layout, plan, whole

_UNKNOWN = Seq2SeqReads(Reads.TOKENS, Reads.TOKENS)


class _Word(threading.local):
    """What a stack left for its position embeddings, in this thread: (T,) positions of packed tokens."""

    positions: Tensor | None = None


_word = _Word()


@dataclass(eq=False)
class Head:
    """What a model that holds stacks tells them."""

    reads: Seq2SeqReads
    labels: Tensor | None = None
    last: Tensor | None = None  # (B,) the position read, for Reads.EOS
    reached: bool = False


@dataclass(eq=False)
class StackCall(Call):
    """One forward pass of one stack."""

    memory: Layout | None = None  # of the encoder's states, where the decoder runs packed
    awaits_positions: bool = False


@dataclass(frozen=True)
class EnterHead:
    """Before a model that holds stacks. What the outermost one reads counts."""

    options: Options
    reads: Seq2SeqReads

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict):
        if KEYWORD in kwargs:
            return None
        head = Head(self.reads)
        if Reads.LABELLED in (self.reads.encoder, self.reads.decoder):
            head.labels = argument(model, "labels", args, kwargs)
        if self.reads.decoder is Reads.EOS:
            head.last = _last_eos(model, args, kwargs)
        return args, {**kwargs, KEYWORD: head}


@dataclass(frozen=True)
class EnterStack:
    """Before a stack: padding goes."""

    options: Options
    stack: Stack

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict):
        _word.positions = None
        head = kwargs.get(KEYWORD, Head(_UNKNOWN))
        head.reached = True
        call = StackCall(
            self.options.backend,
            self.options.padding_free,
            head.reads.decoder if self.stack.is_decoder else head.reads.encoder,
            labels=head.labels,
            last=head.last,
            contiguous=self.stack.relative_bias,
        )
        kwargs = {**kwargs, KEYWORD: call}
        call = begin(model, args, kwargs, self.options, self.stack, call.reads)
        if self.stack.fixed_length:
            return args, kwargs
        tokens = {name: argument(model, name, args, kwargs) for name in PER_TOKEN}
        tokens = {name: value for name, value in tokens.items() if value is not None}
        if not tokens or (self.stack.is_decoder and uses_cache(model, args, kwargs)):
            return args, kwargs
        first = next(iter(tokens.values()))
        if self.stack.is_decoder:
            new = _pack_for_decoder(model, args, kwargs, call, first)
        else:
            mask = argument(model, "attention_mask", args, kwargs)
            new = None if mask is None else _pack(call, mask, first)
        if new is None:
            return args, kwargs
        new.update({name: pack_tokens(call.layout, value) for name, value in tokens.items()})
        given = argument(model, "position_ids", args, kwargs)
        if given is not None or "position_ids" in forward_parameters(model):
            new["position_ids"] = positions(call.layout, given, first.device)
        elif self.stack.positions is not None:
            _word.positions = positions(call.layout, None, first.device)[0]
            call.awaits_positions = True
        return replace_arguments(model, args, kwargs, {**new, **call.layout.keywords})


@dataclass(frozen=True)
class LeaveStack:
    """Behind it: zeros where padding was."""

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict, output):
        call = kwargs[KEYWORD]
        if call.layout is None:
            return None
        if call.awaits_positions and _word.positions is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} did not ask for the positions of its packed tokens; "
                "patch(model, padding_free=False) works without"
            )
        call.check_attended(model)
        return pad_output(call.layout, output)


@dataclass(frozen=True)
class BeforePositions:
    """Before the position embeddings, which count the positions themselves unless told."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict):
        given, _word.positions = _word.positions, None
        if given is None:
            return None
        return replace_arguments(module, args, kwargs, {"position_ids": given})


@dataclass(frozen=True)
class BeforeCrossAttention:
    """Before a cross-attention, which gets the keywords of its layer: those of its keys are others."""

    def __call__(self, attention: nn.Module, args: tuple, kwargs: dict):
        call = kwargs.get(KEYWORD)
        if call is None or call.memory is None:
            return None
        of_keys = {"cu_seq_lens_k": call.memory.cu_seqlens, "max_length_k": call.memory.max_seqlen}
        return args, {**kwargs, **of_keys}


def hook(model: nn.Module, stack: Stack, options: Options) -> list[RemovableHandle]:
    """Everything that patch puts on a stack."""
    before = [(model, EnterStack(options, stack))]
    layers = model.get_submodule(stack.layers)
    crossing = []
    if stack.cross_attention is not None:
        crossing = [layer.get_submodule(stack.cross_attention) for layer in layers]
    before += [(module, BeforeCrossAttention()) for module in crossing]
    if stack.positions is not None:
        before.append((model.get_submodule(stack.positions), BeforePositions()))
    if stack.relative_bias:
        before.append((layers[0].get_submodule(stack.attention), relative.BiasOfSelfAttention()))
        before += [(module, relative.NoBiasOfCrossAttention()) for module in crossing[:1]]
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in before]
    return [*handles, model.register_forward_hook(LeaveStack(), with_kwargs=True)]


def _pack(call: StackCall, mask: Tensor, tokens: Tensor) -> dict | None:
    """The arguments of an encoder that runs packed, but for its tokens."""
    if call.layout_for(mask, tokens.shape[:2]) is None:
        return None
    return {"attention_mask": None}


def _pack_for_decoder(
    model: nn.Module, args: tuple, kwargs: dict, call: StackCall, tokens: Tensor
) -> dict | None:
    """The same for a decoder, whose own tokens or whose encoder's have padding."""
    if call.padding_free is False:
        return None
    states = argument(model, "encoder_hidden_states", args, kwargs)
    states_mask = argument(model, "encoder_attention_mask", args, kwargs)
    memory = None if states is None or states_mask is None else _plan_of_states(states, states_mask)
    if memory is not None and (call.refusal is not None or isinstance(memory, str)):
        call.keep_padding(call.refusal or memory)
        return None
    mask = argument(model, "attention_mask", args, kwargs)
    if mask is None:
        mask = _up_to_last_read(model, call, tokens)
    layout = None if mask is None else call.layout_for(mask, tokens.shape[:2])
    if call.refusal is not None or (layout is None and memory is None):
        return None
    # Where one of the two has padding, the other goes with it.
    call.layout = layout or whole(*tokens.shape[:2], tokens.device)
    set_packing(call.layout.cu_seqlens, len(call.layout.rows))
    new = {"attention_mask": torch.ones(1, len(call.layout.rows), dtype=torch.bool, device=tokens.device)}
    new["use_cache"] = False
    if states is not None:
        call.memory = memory or whole(*states.shape[:2], states.device)
        call.layers *= 2
        new["encoder_hidden_states"] = call.memory.pack(states)
        if states_mask is not None:
            new["encoder_attention_mask"] = None
    return new


def _plan_of_states(states: Tensor, mask: Tensor) -> Layout | str | None:
    """As `plan`, of the encoder's states."""
    if mask.shape != states.shape[:2]:
        return f"the encoder's mask {tuple(mask.shape)} is not that of states {tuple(states.shape[:2])}"
    return plan(mask.to(torch.bool), Reads.TOKENS)


def _up_to_last_read(model: nn.Module, call: StackCall, tokens: Tensor) -> Tensor | None:
    """(B, N) bool in training, where the head alone sees the output: no position behind the last it reads."""
    if not model.training:
        return None
    if call.reads is Reads.LABELLED and call.labels is not None and call.labels.shape == tokens.shape[:2]:
        read = call.labels != -100
        return read.flip(1).cumsum(1).flip(1) > 0
    if call.reads is Reads.EOS and call.last is not None:
        return torch.arange(tokens.shape[1], device=tokens.device) <= call.last[:, None]
    return None


def _last_eos(model: nn.Module, args: tuple, kwargs: dict) -> Tensor | None:
    """(B,): where a sequence classifier reads its decoder, the last end-of-sequence token of input_ids."""
    ids = argument(model, "input_ids", args, kwargs)
    if ids is None:
        return None
    return (torch.arange(ids.shape[1], device=ids.device) * (ids == model.config.eos_token_id)).argmax(1)
