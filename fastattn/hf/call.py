"""One forward pass of a patched model, and what its hooks tell each other.

A `Call` travels with the pass as a keyword argument, which transformers hands down from the head to every
attention. The hooks hold no state of their own, so threads, deepcopy, pickle and a recomputed layer (gradient
checkpointing) need no care.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError, UnsupportedModelError
from ..frozen import set_packing
from ..log import log_once
from . import lost_cut
from .families import Family, Reads, forward_parameters
from .first_token import FirstRows
from .packing import Layout, plan
from .prompt_attention import PromptPass

KEYWORD = "fastattn_call"


@dataclass(frozen=True)
class Options:
    """What the caller of patch chose."""

    padding_free: bool | str  # True, False, "auto"
    backend: str
    recompute: str = "auto"  # "auto", "all", "none"


@dataclass(eq=False)
class Call:
    """One forward pass of one model."""

    backend: str
    padding_free: bool | str
    reads: Reads = Reads.BARE
    labels: Tensor | None = None
    last: Tensor | None = None  # (B,) the positions read, for Reads.LAST and EOS
    contiguous: bool = False  # the model looks at distances, so padding may only lie around the tokens
    reached: bool = False  # the model below the head has got this object
    output_attentions: bool = False
    refusal: str | None = None  # why this pass keeps its padding
    prefix: PromptPass | None = None  # what past_key_values hold, if that is the same for every sample
    layout: Layout | None = None  # set while, and after, the layers run packed
    layers: int = 0
    attended: int = 0  # layers whose attention knew of the packing
    only_first: bool = False  # nothing but first positions will be read of the last layer
    first: FirstRows | None = None  # where those are

    def layout_for(self, mask: Tensor, shape: torch.Size) -> Layout | None:
        """The layout of a batch with this mask, if it has padding that can go; shape is (B, N)."""
        if self.padding_free is False:
            return None
        if self.refusal is None and (mask.dim() != 2 or mask.shape != shape):
            self.refusal = f"the attention mask {tuple(mask.shape)} is not that of tokens {tuple(shape)}"
        if self.refusal is not None and bool(mask.all()):
            return None
        layout = self.refusal or plan(
            mask.to(torch.bool), self.reads, self.labels, self.last, self.contiguous
        )
        if isinstance(layout, str):
            self.keep_padding(layout)
            return None
        self.layout, self.attended = layout, 0
        if layout is not None:
            set_packing(layout.cu_seqlens, len(layout.rows))
        return layout

    def keep_padding(self, reason: str) -> None:
        """There is padding, and it stays."""
        if self.padding_free is True:
            raise UnsupportedError(f"padding_free=True cannot hold here: {reason}")
        log_once(f"padding stays in this batch: {reason}")
        self.refusal = reason

    def check_attended(self, model: nn.Module) -> None:
        """Attention must have known of the packing in every layer; else it was wrong."""
        if self.attended != self.layers:
            raise UnsupportedModelError(
                f"{self.attended} of {self.layers} layers of {type(model).__name__} told attention of the "
                "packed sequences; patch(model, padding_free=False) works without"
            )


def begin(
    model: nn.Module,
    args: tuple,
    kwargs: dict,
    options: Options,
    family: Family,
    reads: Reads,
    prefix: PromptPass | None = None,
) -> Call:
    """The call of this pass as the bare model gets it: from the head, or a new one that reads `reads`."""
    call = kwargs.get(KEYWORD)
    if call is None:
        call = Call(options.backend, options.padding_free, reads)
    call.reached = True
    set_packing(None)
    lost_cut.watch(args, kwargs)
    call.layers = family.num_layers(model)
    call.contiguous = call.contiguous or family.contiguous(model)
    call.output_attentions = bool(
        kwargs.get("output_attentions", getattr(model.config, "output_attentions", False))
    )
    attends_here = model.config._attn_implementation == "fastattn" and not call.output_attentions
    call.prefix = prefix if attends_here else None
    call.refusal = _refusal(model, args, kwargs, call, family)
    if family.drops_by_function and model.training and not torch.compiler.is_compiling():
        _say_who_drops(model)
    return call


def _say_who_drops(model: nn.Module) -> None:
    if getattr(model.config, "dropout", 0.0) > 0.0:
        log_once(
            f"dropout of hidden states in {model.config.model_type} is torch's, on a CPU serial and with a "
            "stored mask: the model calls a function where others have modules"
        )


def _refusal(model: nn.Module, args: tuple, kwargs: dict, call: Call, family: Family) -> str | None:
    """Why this pass keeps its padding, as far as is known before the embeddings."""
    config = model.config
    if call.padding_free is False:
        return "padding_free=False"
    if config._attn_implementation != "fastattn":
        return f"the model's attn_implementation was set to {config._attn_implementation!r} after patch"
    if call.reads is Reads.ALL:
        return "the model's head reads the output at padded positions"
    for name in ("past_key_values", *(() if family.attends_to_encoder else ("encoder_hidden_states",))):
        if name == "past_key_values" and call.prefix is not None:
            continue
        if argument(model, name, args, kwargs) is not None:
            return f"{name} is given"
    if call.output_attentions:
        return "output_attentions=True"
    if model.training and getattr(model, "layerdrop", 0.0) > 0.0:
        return "layerdrop leaves out layers at random"
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return "the model is being traced, and the number of real tokens is data"
    return None


def argument(module: nn.Module, name: str, args: tuple, kwargs: dict):
    """An argument of module.forward, however it was passed."""
    if name in kwargs:
        return kwargs[name]
    names = forward_parameters(module)
    position = names.index(name) if name in names else len(args)
    return args[position] if position < len(args) else None


def replace_arguments(module: nn.Module, args: tuple, kwargs: dict, new: dict) -> tuple[tuple, dict]:
    """args and kwargs with those of `new` in place, however they were passed."""
    new = dict(new)
    args = tuple(new.pop(name, value) for name, value in zip(forward_parameters(module), args, strict=False))
    return args, {**kwargs, **new}


def pad_output(layout: Layout, output):
    """A model's output with every packed (1, T, C) in it padded to (B, N, C)."""
    if isinstance(output, Tensor):
        packed = output.dim() == 3 and tuple(output.shape[:2]) == (1, layout.rows.shape[0])
        return layout.pad(output) if packed else output
    if isinstance(output, tuple):
        return tuple(pad_output(layout, value) for value in output)
    if isinstance(output, dict):
        for name in ("last_hidden_state", "hidden_states"):
            if name in output:
                output[name] = pad_output(layout, output[name])
    return output


@dataclass(frozen=True)
class EnterHead:
    """Before a model with a head: note what the head will read."""

    options: Options
    reads: Reads

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict):
        call = Call(self.options.backend, self.options.padding_free, self.reads)
        call.labels = argument(model, "labels", args, kwargs)
        if self.reads is Reads.LAST:
            call.last = _last_token(model, args, kwargs)
        return args, {**kwargs, KEYWORD: call}


@dataclass(frozen=True)
class LeaveHead:
    """Behind it: the note must have arrived, or the encoder packed without knowing."""

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict, output):
        if not kwargs[KEYWORD].reached:
            raise UnsupportedModelError(
                f"{type(model).__name__} did not pass its keyword arguments on to its encoder; "
                "this version of transformers is not one that fastattn knows"
            )


def _last_token(model: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    """(B,): the position that a decoder with a sequence classifier reads, the last that is no pad token."""
    ids = argument(model, "input_ids", args, kwargs)
    shape_of = argument(model, "inputs_embeds", args, kwargs) if ids is None else ids
    batch, seqlen = shape_of.shape[:2]
    pad = model.config.get_text_config().pad_token_id
    if ids is None or pad is None:
        return torch.full((batch,), seqlen - 1, device=shape_of.device)
    return (torch.arange(seqlen, device=ids.device) * (ids != pad)).argmax(-1)
