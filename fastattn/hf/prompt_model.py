"""Which models a prompt can be shared in, and whether they are still those it was computed with."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..errors import InvalidArgumentError, UnsupportedModelError
from .decoder import EnterDecoder
from .families import DecoderFamily, find_family, forward_parameters

# Rotary embeddings whose angles depend on the length of the whole text: the prompt's keys would differ.
_ANGLES_BY_LENGTH = ("dynamic", "longrope")


def language_model(model: nn.Module) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The causal language model and its patched bare model, out of what the caller has."""
    if not isinstance(model, PreTrainedModel) and hasattr(model, "active_peft_config"):
        if model.active_peft_config.is_prompt_learning:
            raise UnsupportedModelError(
                "a peft model with prompt or prefix tuning brings a prompt of its own; share that one by "
                "prompt_embeds"
            )
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise InvalidArgumentError("model", f"a {type(model).__name__}", "a transformers model")
    family = find_family(model.config.model_type)
    if not isinstance(family, DecoderFamily):
        raise UnsupportedModelError(
            f"a shared prompt needs a causal decoder that fastattn knows, and {type(model).__name__} "
            f"({model.config.model_type!r}) is none"
        )
    if model.get_output_embeddings() is None or "logits_to_keep" not in forward_parameters(model):
        raise UnsupportedModelError(f"{type(model).__name__} has no language modelling head")
    base = next((m for m in model.modules() if _is_patched(m)), None)
    if base is None:
        raise InvalidArgumentError(
            "model", f"an unpatched {type(model).__name__}", "fastattn.patch(model) first"
        )
    if base.config._attn_implementation != "fastattn":
        raise InvalidArgumentError(
            "model",
            f"with {base.config._attn_implementation!r} attention since patch",
            "'fastattn' attention",
        )
    rope = getattr(model.config, "rope_parameters", None) or {}
    kinds = {entry.get("rope_type") for entry in (rope, *rope.values()) if isinstance(entry, dict)}
    if kinds.intersection(_ANGLES_BY_LENGTH):
        raise UnsupportedModelError(
            f"{type(model).__name__} rotates by the length of the whole text "
            f"({', '.join(_ANGLES_BY_LENGTH)}); a prompt's keys would not be those of the concatenation"
        )
    return model, base


def _is_patched(module: nn.Module) -> bool:
    return any(isinstance(hook, EnterDecoder) for hook in module._forward_pre_hooks.values())


def check_positions(model: PreTrainedModel, what: str, length: int) -> None:
    """A text longer than the model's positions is refused here, not by an index error in an embedding."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise InvalidArgumentError(what, f"of {length} tokens", f"at most the model's {limit} positions")


def weights_state(model: nn.Module) -> tuple:
    """Something that changes when a weight is written to or an adapter is switched."""
    weights = tuple((id(p), p._version) for p in model.parameters())
    adapters = tuple(
        (module.disable_adapters, module.merged, *module.active_adapters)
        for module in model.modules()
        if hasattr(module, "merged_adapters")  # peft's tuned layers
    )
    return weights, adapters


def check_weights_unchanged(model: nn.Module, before: tuple) -> None:
    if weights_state(model) != before:
        raise InvalidArgumentError(
            "model",
            "with other weights or adapters than the prompt was computed with",
            "a new SharedPrompt whenever they change",
        )
