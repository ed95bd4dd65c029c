"""patch, unpatch, patched: fastattn in a model that is in memory, and out of it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .. import dispatch
from ..errors import BackendUnavailableError, InvalidArgumentError, UnsupportedModelError
from ..frozen import Recompute
from ..log import logger
from . import decoder, encoder, first_token, seq2seq, vision
from .call import EnterHead, LeaveHead, Options
from .families import EncoderFamily, Family, Reads, VisionFamily, find_family, forward_parameters, supported
from .families.own_attention import OwnAttentionFamily, restore_attentions
from .families.stacks import Seq2SeqReads, Stack
from .interface import NAME
from .layers import ReplaceAdapters, replace_layers, restore_layers
from .lost_cut import BeforeFirstLayer
from .rotary import replace_rotary, restore_rotary

Model = TypeVar("Model", bound=nn.Module)
_RECORD = "_fastattn_patch"


@dataclass
class _Record:
    """What patch did to one module. Lives on the module, so that copies of the model carry it along."""

    options: Options
    handles: list[RemovableHandle]
    is_base: bool
    attn_implementation: str | None = None  # of the base's config before patch
    recompute: Recompute | None = None


def patch(
    model: Model, *, padding_free: bool | str = "auto", recompute: str = "auto", backend: str = "auto"
) -> Model:
    """Compute a transformers model's attention in fastattn, without padding where possible. In place.

    Works on bare models, models with a head, modules that contain them, and peft models (before or after
    get_peft_model). Logits, losses and gradients stay those of the unpatched model; a padded position's own
    hidden state comes back as zeros. state_dict and save_pretrained are not affected.

    Args:
        model: holds one or more transformers models of a supported family.
        padding_free: "auto" leaves padding out of every batch where that changes nothing that is read, and
            logs once why it could not; True raises UnsupportedError where it cannot; False never does.
            Decoders keep their padding where they use a key/value cache; in training they return none. In
            training, an encoder-decoder model without a decoder mask ends each sample at its last label that
            is not -100: logits behind it are those of a zero state.
        recompute: which tensors backward computes again instead of finding them saved: outputs of linear
            layers, norms and activations inside the model. "all" of them; "auto" those whose cost stays below
            15% of a step's matrix products, chosen by the first step; "none". Gradients are the same to the
            bit.
        backend: as in `fastattn.attention`.

    Returns:
        The model itself.

    Raises:
        UnsupportedModelError: nothing in it is of a supported family, part of it is not, or it is not built
        as expected.
        InvalidArgumentError: a malformed option, or the model is patched already with other options.
        BackendUnavailableError: the backend named is not on this machine.
    """
    options = _check_options(padding_free, recompute, backend)
    sites = _find(model)
    for module, _, _ in sites:
        record = getattr(module, _RECORD, None)
        if record is not None and record.options != options:
            raise InvalidArgumentError(
                "model", f"patched with {record.options}", "unpatch(model) before other options"
            )
    for module, family, reads in sites:
        if getattr(module, _RECORD, None) is None:
            if reads is None:
                _patch_base(module, family, options)
            else:
                _patch_head(module, family, reads, options)
    return model


def unpatch(model: Model) -> Model:
    """Take patch back: the model is as it was. Does nothing to a model that is not patched."""
    for module in model.modules():
        record = module.__dict__.get(_RECORD)
        if record is None:
            continue
        for handle in record.handles:
            handle.remove()
        if record.recompute is not None:
            record.recompute.detach()
        restore_layers(module)
        restore_rotary(module)
        restore_attentions(module)
        # Whoever chose another implementation since patch keeps it.
        if record.is_base and module.config._attn_implementation == NAME:
            module.config._attn_implementation_internal = record.attn_implementation
        delattr(module, _RECORD)
    return model


@contextmanager
def patched(
    model: Model, *, padding_free: bool | str = "auto", recompute: str = "auto", backend: str = "auto"
) -> Iterator[Model]:
    """`with patched(model):` is patch, and unpatch at the end unless the model came patched."""
    came_patched = any(_RECORD in module.__dict__ for module in model.modules())
    try:
        yield patch(model, padding_free=padding_free, recompute=recompute, backend=backend)
    finally:
        if not came_patched:
            unpatch(model)


def recompute_of(module: nn.Module) -> Recompute | None:
    """What computes tensors again in this very module, a patched bare model."""
    record = vars(module).get(_RECORD)
    return None if record is None else record.recompute


def _check_options(padding_free: bool | str, recompute: str, backend: str) -> Options:
    if padding_free not in (True, False, "auto"):
        raise InvalidArgumentError("padding_free", repr(padding_free), "True, False or 'auto'")
    if recompute not in ("auto", "all", "none"):
        raise InvalidArgumentError("recompute", repr(recompute), "'auto', 'all' or 'none'")
    dispatch.check_name(backend)
    if backend not in ("auto", "reference") and isinstance(reason := dispatch.load(backend), str):
        raise BackendUnavailableError(backend, reason)
    return Options(padding_free, backend, recompute)


def _find(model: nn.Module) -> list[tuple[PreTrainedModel, Family, Reads | Seq2SeqReads | None]]:
    """Every place to patch: bare models (reads None) and models with a head. Nothing has been touched yet."""
    if not isinstance(model, nn.Module):
        raise InvalidArgumentError("model", f"a {type(model).__name__}", "a torch.nn.Module")
    sites, unknown = [], []
    for path, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        family = find_family(module.config.model_type)
        if family is None:
            unknown.append(f"{path or 'the model'} ({type(module).__name__}, {module.config.model_type!r})")
        elif (part := family.part(module)) is not None:
            part.check(module)
            sites.append((module, part, None))
        else:
            reads = family.reads(module)
            if reads is not None:
                if forward_parameters(module)[-1] != "**":
                    raise UnsupportedModelError(
                        f"{type(module).__name__}.forward takes no **kwargs to pass on"
                    )
                sites.append((module, family, reads))
    if unknown or not any(reads is None for _, _, reads in sites):
        found = "; ".join(unknown) or "no transformers model"
        would = ", ".join(type(module).__name__ for module, _, _ in sites) or "nothing"
        raise UnsupportedModelError(
            f"patch does not know {found} in this {type(model).__name__} (it would patch: {would}). "
            f"Supported model types: {', '.join(supported())}"
        )
    return sites


def _patch_base(model: PreTrainedModel, family: Family, options: Options) -> None:
    padding = f"padding_free {options.padding_free} (padded positions come back as zeros)"
    if isinstance(family, EncoderFamily):
        handles = _hook_encoder(model, family, options)
    elif isinstance(family, Stack):
        handles = seq2seq.hook(model, family, options)
        if family.fixed_length:
            padding = "no padding: its input has one length"
    elif isinstance(family, VisionFamily):
        padding = "no padding: its input has one length"
        enter = vision.EnterVision(options, family)
        handles = [model.register_forward_pre_hook(enter, with_kwargs=True)]
    else:
        enter = decoder.EnterDecoder(options, family)
        if isinstance(family, OwnAttentionFamily):
            from . import own_attention  # it needs classes that transformers may lose

            own_attention.replace_attentions(model, family, options.backend)
            enter = own_attention.EnterOwnDecoder(options, family)
        handles = [
            model.register_forward_pre_hook(enter, with_kwargs=True),
            model.register_forward_hook(decoder.LeaveDecoder(), with_kwargs=True),
        ]
    layers = tuple(family.layer_modules(model))
    handles.append(layers[0].register_forward_pre_hook(BeforeFirstLayer(layers), with_kwargs=True))
    before = model.config._attn_implementation
    # The internal attribute, as set_attn_implementation does: sub-configs are models of their own.
    model.config._attn_implementation_internal = NAME
    replace_layers(model)
    if family.rotary:
        replace_rotary(family.attention_modules(model))
    handles.append(model.register_forward_pre_hook(ReplaceAdapters()))
    recompute = None if options.recompute == "none" else Recompute(options.recompute).attach(model)
    setattr(model, _RECORD, _Record(options, handles, True, before, recompute))
    logger.info(
        "patched %s: %d layers, backend %s, %s",
        type(model).__name__,
        family.num_layers(model),
        options.backend,
        padding,
    )


def _hook_encoder(model: PreTrainedModel, family: EncoderFamily, options: Options) -> list[RemovableHandle]:
    layers = getattr(model, family.encoder)
    handles = [
        model.register_forward_pre_hook(encoder.EnterModel(options, family), with_kwargs=True),
        model.register_forward_hook(encoder.LeaveModel(), with_kwargs=True),
        layers.register_forward_pre_hook(encoder.EnterEncoder(), with_kwargs=True),
        layers.register_forward_hook(encoder.LeaveEncoder(), with_kwargs=True),
    ]
    if (last := family.last_attention(model)) is not None:
        handles += [
            last[0].register_forward_pre_hook(first_token.BeforeAttention(), with_kwargs=True),
            last[1].register_forward_pre_hook(first_token.BehindAttention()),
        ]
    return handles


def _patch_head(
    model: PreTrainedModel, family: Family, reads: Reads | Seq2SeqReads, options: Options
) -> None:
    enter = EnterHead if isinstance(reads, Reads) else seq2seq.EnterHead
    if isinstance(family, OwnAttentionFamily):
        from .own_attention import EnterOwnHead as enter
    handles = [
        model.register_forward_pre_hook(ReplaceAdapters()),
        model.register_forward_pre_hook(enter(options, reads), with_kwargs=True),
        model.register_forward_hook(LeaveHead(), with_kwargs=True),
    ]
    replace_layers(model)
    setattr(model, _RECORD, _Record(options, handles, False))
    logger.info("patched %s, which reads %s", type(model).__name__, reads.value)
