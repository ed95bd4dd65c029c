"""What `--train` means: which parameters of a model are trained, and what peft adds to it for that."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from torch.utils._pytree import tree_map

from fastattn.errors import MissingDependencyError
from fastattn.finetune.errors import UserInputError
from fastattn.finetune.objectives import Objective
from fastattn.finetune.settings import VIRTUAL_TOKENS

__all__ = ["choose_trained", "head_modules", "is_prompt_learning", "unwrap_head"]

LORA_RANK, LORA_ALPHA = 8, 16


def choose_trained(model: nn.Module, method: str, objective: Objective, mixed: bool = False) -> nn.Module:
    """Freezes all but what `method` trains; a classifier's head always trains. Adapters make it a peft model.

    Args:
        mixed: the model is in bfloat16; modules trained as a whole (head, adapters, layers) go to float32.
            Single parameters of frozen modules (biases, norms) stay: the optimizer has them in float32.
    """
    head = _language_head(model, method) if objective.is_language else head_modules(model)
    for module in head.values() if mixed else ():
        _to_float32(module)
    if method == "lora":
        return _with_lora(model, list(head), objective, mixed)
    if method in ("prefix", "prompt"):
        return _with_virtual_tokens(model, method, list(head), objective)
    model.requires_grad_(method == "full")
    for module in head.values():
        module.requires_grad_(True)
    if method.startswith("last-"):
        layers, wanted = _layers(model), int(method.removeprefix("last-"))
        if wanted > len(layers):
            raise UserInputError(f"--train {method}: the model has {len(layers)} layers")
        for layer in layers[-wanted:]:
            layer.requires_grad_(True)
            if mixed:
                _to_float32(layer)
                layer.register_forward_hook(_rounded)  # what follows, a last norm perhaps, is frozen
    for module in model.modules():
        if method == "ln" and _is_norm(module):
            module.requires_grad_(True)
        if method == "bitfit" and isinstance(getattr(module, "bias", None), nn.Parameter):
            module.bias.requires_grad_(True)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserInputError(f"--train {method}: {model.config.model_type} has nothing of the kind to train")
    return model


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules above the encoder: what sequence classification adds to it, and the encoder's pooler."""
    prefix = model.base_model_prefix
    head = {
        name: module for name, module in model.named_children() if name != prefix and _has_weights(module)
    }
    pooler = getattr(model.base_model, "pooler", None)
    return {f"{prefix}.pooler": pooler, **head} if pooler is not None else head


def _language_head(model: nn.Module, method: str) -> dict[str, nn.Module]:
    """The layer that scores the vocabulary, for --train head. It has learned already."""
    if method != "head":
        return {}
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is embeddings.weight:
        raise UserInputError("--train head: this model's head is its word embeddings; try lora")
    return {name: module for name, module in model.named_modules() if module is head}


def is_prompt_learning(model: nn.Module) -> bool:
    """Whether peft puts virtual tokens before the text: those cannot be merged into weights."""
    return hasattr(model, "peft_config") and model.active_peft_config.is_prompt_learning


def _to_float32(module: nn.Module) -> None:
    """Weights and arithmetic. The hook is a plain function, so that copies of the module keep it."""
    module.float()
    module.register_forward_pre_hook(_widened, with_kwargs=True)


def _widened(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return tree_map(lambda value: _cast(value, torch.float32), (args, kwargs))


def _rounded(module: nn.Module, args: tuple, output):
    return tree_map(lambda value: _cast(value, torch.bfloat16), output)


def _cast(value, dtype: torch.dtype):
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _with_lora(model: nn.Module, head: list[str], objective: Objective, mixed: bool) -> nn.Module:
    peft = _peft()
    known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    config = peft.LoraConfig(
        task_type=objective.peft_task,
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=0.0,
        target_modules=None if model.config.model_type in known else "all-linear",
        modules_to_save=[name.rsplit(".", 1)[-1] for name in head] or None,
    )
    # Otherwise adapters have the model's dtype: the optimizer keeps fp32 copies of all that is trained.
    return peft.get_peft_model(model, config, autocast_adapter_dtype=mixed)


def _with_virtual_tokens(model: nn.Module, method: str, head: list[str], objective: Objective) -> nn.Module:
    """Prefix tuning (trained keys and values before every layer's own) or prompt tuning (trained embeddings
    before the first layer's). peft keeps both in float32."""
    peft = _peft()
    common = {"task_type": objective.peft_task, "num_virtual_tokens": VIRTUAL_TOKENS}
    if method == "prefix":
        config = peft.PrefixTuningConfig(**common)
    else:
        # Before the encoder alone, where there is one. Embeddings of random words to begin with: normally
        # distributed ones are far outside of what the model knows.
        config = peft.PromptTuningConfig(
            **common,
            prompt_tuning_init="SAMPLE_VOCAB",
            num_transformer_submodules=1,
            # peft knows few families' names for these, and takes hidden_size for the width of embeddings
            token_dim=model.get_input_embeddings().embedding_dim,
            num_layers=model.config.num_hidden_layers,
            num_attention_heads=model.config.num_attention_heads,
        )
    name = model.config.model_type
    if method == "prefix" and not _takes_past(model):
        raise UserInputError(f"--train prefix: {name} takes no keys and values from outside; try prompt")
    try:
        adapted = peft.get_peft_model(model, config)
    except (ValueError, KeyError, AttributeError) as error:
        raise UserInputError(f"--train {method}: peft cannot do this with {name}: {error}") from error
    for module in map(model.get_submodule, head):
        if not isinstance(module, peft.utils.ModulesToSaveWrapper):  # peft trains a copy of the classifier
            module.requires_grad_(True)
    return adapted


def unwrap_head(model: nn.Module) -> None:
    """Puts the copies that peft trained in place of the modules they were copied from."""
    wrapper = _peft().utils.ModulesToSaveWrapper
    for name, module in list(model.named_modules()):
        if isinstance(module, wrapper):
            model.set_submodule(name, module.modules_to_save[module.active_adapter])


def _takes_past(model: nn.Module) -> bool:
    return "past_key_values" in inspect.signature(model.base_model.forward).parameters


def _peft():
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError("peft", "finetune") from error
    return peft


def _layers(model: nn.Module) -> nn.ModuleList:
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserInputError(f"--train last-N: no list of layers was found in {type(model).__name__}")
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def _is_norm(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return "layernorm" in name or "rmsnorm" in name


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
