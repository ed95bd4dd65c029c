"""The padding-free encoder: between the embeddings and the head, only real tokens exist.

About half of a classification batch is padding. The hooks here take it out before the first layer, tell
attention where each sequence lies (transformers' own cu_seq_lens_q keywords), and put zeros in its place
behind the last layer and in every entry of output_hidden_states. That is exact for every real token: nothing
but attention mixes positions, and attention never looks at padding. What transformers computes at the padded
positions themselves differs, and is used by no model that `Reads` lets through.

One `Call` object travels with each forward as a keyword argument. The hooks hold no state of their own, so
that threads, deepcopy, pickle and a recomputed layer (gradient checkpointing) need no care.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError, UnsupportedModelError
from .families import EncoderFamily, Reads, forward_parameters
from .first_token import FirstRows, first_rows
from .log import log_once

KEYWORD = "fastattn_call"


@dataclass(frozen=True)
class Options:
    """What the caller of patch chose."""

    padding_free: bool | str  # True, False, "auto"
    backend: str


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a (B, N) batch lie in its packed form, a row of T."""

    batch: int
    seqlen: int
    rows: Tensor  # int64 (T,): position b * N + n of each token, ascending
    cu_seqlens: Tensor  # int32 (B + 1,)
    max_seqlen: int
    min_seqlen: int

    def pack(self, hidden: Tensor) -> Tensor:
        """(B, N, C) -> (1, T, C)"""
        return _Gather.apply(hidden.reshape(self.batch * self.seqlen, -1), self.rows).unsqueeze(0)

    def pad(self, hidden: Tensor) -> Tensor:
        """(1, T, C) -> (B, N, C), zero where there is no token"""
        padded = _Scatter.apply(hidden.squeeze(0), self.rows, self.batch * self.seqlen)
        return padded.view(self.batch, self.seqlen, -1)


@dataclass(eq=False)
class Call:
    """One forward pass of one model."""

    backend: str
    padding_free: bool | str
    reads: Reads = Reads.BARE
    labels: Tensor | None = None
    reached: bool = False  # the model below the head has got this object
    refusal: str | None = None  # why this pass keeps its padding
    layout: Layout | None = None  # set while, and after, the layers run packed
    attended: int = 0  # layers whose attention knew of the packing
    only_first: bool = False  # nothing but first positions will be read of the last layer
    first: FirstRows | None = None  # where those are


class _Gather(torch.autograd.Function):
    """Rows of a matrix. index_select's own gradient adds; these rows are distinct, so it can copy."""

    @staticmethod
    def forward(ctx, matrix: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.height = matrix.shape[0]
        return matrix.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Scatter.apply(grad, ctx.saved_tensors[0], ctx.height), None


class _Scatter(torch.autograd.Function):
    """Rows put back into a matrix of zeros."""

    @staticmethod
    def forward(ctx, packed: Tensor, rows: Tensor, height: int) -> Tensor:
        ctx.save_for_backward(rows)
        return packed.new_zeros(height, packed.shape[1]).index_copy_(0, rows, packed)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Gather.apply(grad, ctx.saved_tensors[0]), None, None


@torch.compiler.disable
def plan(mask: Tensor, reads: Reads, labels: Tensor | None) -> Layout | str:
    """The layout of a batch with this (B, N) bool mask, or why leaving out its padding would change what is
    read.

    Reads the mask's values once: on a GPU the one point where the host waits.
    """
    lengths = mask.sum(dim=1, dtype=torch.int32)
    changes = torch.zeros((), dtype=torch.bool, device=mask.device)
    reason = ""
    if reads in (Reads.FIRST, Reads.BARE):
        # A sample with no token at all has nothing to lose.
        changes = ((~mask[:, 0]) & (lengths > 0)).any()
        reason = "a sample's first position is masked (left padding), and it may be read"
    elif reads is Reads.LABELLED and labels is not None:
        if labels.shape != mask.shape:
            return (
                f"labels of shape {tuple(labels.shape)} do not match the attention mask's {tuple(mask.shape)}"
            )
        changes = ((labels != -100) & ~mask).any()
        reason = "a masked position has a label other than -100, so its output counts in the loss"
    facts = [lengths.sum(), lengths.max(), lengths.min(), changes.to(torch.int32)]
    total, longest, shortest, changed = torch.stack(facts).tolist()
    if changed:
        return reason
    if total == 0:
        return "no sample has a token"
    rows = torch.nonzero_static(mask.flatten(), size=total).squeeze(1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return Layout(mask.shape[0], mask.shape[1], rows, cu_seqlens, longest, shortest)


@dataclass(frozen=True)
class EnterHead:
    """Before a model with a head: note what the head will read."""

    options: Options
    reads: Reads

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict):
        call = Call(self.options.backend, self.options.padding_free, self.reads)
        call.labels = _argument(model, "labels", args, kwargs)
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


@dataclass(frozen=True)
class EnterModel:
    """Before the bare model: what can be said without its mask."""

    options: Options

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict):
        call = kwargs.get(KEYWORD)
        if call is None:
            call = Call(self.options.backend, self.options.padding_free)
        call.reached = True
        kwargs = {**kwargs, KEYWORD: call}
        if getattr(model.config, "output_attentions", False):
            kwargs.setdefault("output_attentions", True)
        call.refusal = _refusal(model, args, kwargs, call)
        call.only_first = (
            call.reads is Reads.FIRST
            and call.refusal is None
            and not kwargs.get("output_hidden_states", getattr(model.config, "output_hidden_states", False))
            and all(isinstance(hook, LeaveModel) for hook in model._forward_hooks.values())
        )
        return args, kwargs


@dataclass(frozen=True)
class LeaveModel:
    """Behind it: hidden states that were recorded between the layers get their padding back."""

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict, output):
        layout = kwargs[KEYWORD].layout
        if layout is None:
            return None
        if isinstance(output, tuple):
            return tuple(_pad_recorded(layout, value) for value in output)
        if "hidden_states" in output:
            output["hidden_states"] = _pad_recorded(layout, output["hidden_states"])
        return output


@dataclass(frozen=True)
class EnterEncoder:
    """Before the first layer: padding goes."""

    def __call__(self, encoder: nn.Module, args: tuple, kwargs: dict):
        call = kwargs.get(KEYWORD)
        if call is None:
            return None
        only_first = call.only_first and all(
            isinstance(hook, LeaveEncoder) for hook in encoder._forward_hooks.values()
        )
        hidden = _argument(encoder, "hidden_states", args, kwargs)
        mask = _argument(encoder, "attention_mask", args, kwargs)
        if only_first:
            call.first = first_rows(None, hidden.device)
        if mask is None:
            return None
        reason = call.refusal
        if reason is None and (mask.dim() != 2 or mask.dtype != torch.bool):
            reason = f"the attention mask has the shape {tuple(mask.shape)}, not (B, N)"
        if reason is None and mask.shape != hidden.shape[:2]:
            reason = (
                f"the attention mask {tuple(mask.shape)} does not match the tokens {tuple(hidden.shape[:2])}"
            )
        layout = plan(mask, call.reads, call.labels) if reason is None else reason
        if isinstance(layout, str):
            if call.padding_free is True:
                raise UnsupportedError(f"padding_free=True cannot hold here: {layout}")
            if call.padding_free == "auto":
                log_once(f"padding stays in this batch: {layout}")
            return None
        call.layout, call.attended = layout, 0
        if only_first:
            call.first = first_rows(layout.cu_seqlens, hidden.device) if layout.min_seqlen else None
        packed = layout.pack(hidden)
        names = forward_parameters(encoder)
        replaced = {"hidden_states": packed, "attention_mask": None}
        args = tuple(replaced.pop(name, value) for name, value in zip(names, args, strict=False))
        lengths = {
            "cu_seq_lens_q": layout.cu_seqlens,
            "cu_seq_lens_k": layout.cu_seqlens,
            "max_length_q": layout.max_seqlen,
            "max_length_k": layout.max_seqlen,
        }
        return args, {**kwargs, **replaced, **lengths}


@dataclass(frozen=True)
class LeaveEncoder:
    """Behind the last layer: zeros where padding was."""

    family: EncoderFamily

    def __call__(self, encoder: nn.Module, args: tuple, kwargs: dict, output):
        call = kwargs.get(KEYWORD)
        if call is None or (call.layout is None and call.first is None):
            return None
        hidden = output.last_hidden_state
        if call.first is not None:
            if hidden.shape[1] != len(call.first.rows):
                raise UnsupportedModelError(
                    f"the last layer of {type(encoder).__name__} returned {hidden.shape[1]} rows where "
                    f"{len(call.first.rows)} were asked for; patch(model, padding_free=False) works without"
                )
            output.last_hidden_state = hidden if call.layout is None else hidden.transpose(0, 1)
        else:
            output.last_hidden_state = call.layout.pad(hidden)
        layers = self.family.num_layers(encoder)
        if call.layout is not None and call.attended != layers:
            # Attention across sequence boundaries would be silently wrong.
            raise UnsupportedModelError(
                f"{call.attended} of {layers} layers of {type(encoder).__name__} told their attention of the "
                "packed sequences; patch(model, padding_free=False) works without"
            )
        return output


def _refusal(model: nn.Module, args: tuple, kwargs: dict, call: Call) -> str | None:
    """Why this pass keeps its padding, as far as is known before the embeddings."""
    config = model.config
    if call.padding_free is False:
        return "padding_free=False"
    if config._attn_implementation != "fastattn":
        return f"the model's attn_implementation was set to {config._attn_implementation!r} after patch"
    if call.reads is Reads.ALL:
        return "the model's head reads the output at padded positions"
    if getattr(config, "is_decoder", False):
        return "the encoder runs as a decoder"
    for name in ("past_key_values", "encoder_hidden_states"):
        if _argument(model, name, args, kwargs) is not None:
            return f"{name} is given"
    if kwargs.get("output_attentions"):
        return "output_attentions=True"
    if getattr(config, "chunk_size_feed_forward", 0):
        return "chunk_size_feed_forward cuts the sequence into equal parts"
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return "the model is being traced, and the number of real tokens is data"
    return None


def _argument(module: nn.Module, name: str, args: tuple, kwargs: dict):
    """An argument of module.forward, however it was passed."""
    if name in kwargs:
        return kwargs[name]
    names = forward_parameters(module)
    position = names.index(name) if name in names else len(args)
    return args[position] if position < len(args) else None


def _pad_recorded(layout: Layout, value):
    """A tuple of hidden states with every packed one padded; anything else as it is."""
    if not isinstance(value, tuple):
        return value
    packed = (1, layout.rows.shape[0])
    return tuple(
        layout.pad(state) if isinstance(state, Tensor) and tuple(state.shape[:2]) == packed else state
        for state in value
    )
