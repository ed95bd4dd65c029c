"""Small seeded models and batches for the transformers tests, and how results are compared."""

import copy
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import nn

from fastattn import dispatch

VOCAB = 99
ENCODERS = ("bert", "roberta", "distilbert", "electra")
HEADS = ("SequenceClassification", "TokenClassification", "MaskedLM")
PADDINGS = ("none", "right", "left", "holes")

_NAMES = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "electra": "Electra"}
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_DISTIL_NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}

# What a user gets on a CPU; the oracle where the native library was not built.
BACKEND = "reference" if isinstance(dispatch.load("cpu"), str) else "auto"


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small run faster on one thread, by far where other processes run too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(family: str, head: str = "SequenceClassification", seed: int = 0, **changes) -> nn.Module:
    """A model of that family in eval mode, unpatched, with eager attention; `changes` go to its config."""
    settings = {**_SIZES, "num_labels": 3, **changes}
    if family == "distilbert":
        settings = {_DISTIL_NAMES.get(name, name): value for name, value in settings.items()}
        settings["seq_classif_dropout"] = 0.0
    if family == "electra":
        settings["embedding_size"] = 24
    if family == "roberta":
        settings["max_position_embeddings"] = 70
    config = getattr(transformers, f"{_NAMES[family]}Config")(**settings)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    name = f"{_NAMES[family]}Model" if head == "Model" else f"{_NAMES[family]}For{head}"
    model = getattr(transformers, name)(config).eval()
    return _stirred(model)


def _stirred(model: nn.Module) -> nn.Module:
    """The initial weights leave attention close to a mean; these make errors in it visible."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # sinusoidal positions are what they are, and not saved
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def decoder(kind: str, head: str = "CausalLM", **changes) -> nn.Module:
    """A causal model in eval mode, unpatched, with eager attention."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "gpt2":
        sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
        heads = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    names = {"gpt2": "GPT2", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
    config = getattr(transformers, f"{names[kind]}Config")(**sizes, **heads, **special, **changes)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    name = f"{names[kind]}For{head}"
    if kind == "gpt2" and head == "CausalLM":
        name = "GPT2LMHeadModel"
    model = getattr(transformers, name)(config).eval()
    return _stirred(model)


def batch(padding: str = "right", size: int = 5, length: int = 23, seed: int = 0) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, with every sample's token count different."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (size, length), generator=generator)
    mask = torch.ones(size, length, dtype=torch.long)
    for row in range(1, size):
        missing = 1 + (row * 7) % (length - 1)
        if padding == "right":
            mask[row, length - missing :] = 0
        elif padding == "left":
            mask[row, :missing] = 0
        elif padding == "holes":
            mask[row, 1 + torch.randperm(length - 1, generator=generator)[:missing]] = 0
    return {"input_ids": ids, "attention_mask": mask}


def labels_for(head: str, inputs: dict[str, torch.Tensor], seed: int = 1) -> torch.Tensor:
    """Labels such a head is trained with; padding has -100."""
    generator = torch.Generator().manual_seed(seed)
    mask = inputs["attention_mask"]
    if head == "SequenceClassification":
        return torch.randint(0, 3, (len(mask),), generator=generator)
    classes = VOCAB if head == "MaskedLM" else 3
    return torch.randint(0, classes, mask.shape, generator=generator).masked_fill(mask == 0, -100)


def run(model: nn.Module, inputs: dict, **options) -> dict[str, torch.Tensor]:
    """Logits at real tokens, loss, and every gradient, by name."""
    model.zero_grad(set_to_none=True)
    out = model(**inputs, **options)
    out.loss.backward()
    logits = out.logits
    if logits.dim() == 3:
        real = real_tokens(inputs)
        logits = logits[:, -real.shape[1] :][real]  # peft's virtual tokens come first
    result = {"logits": logits.detach(), "loss": out.loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            result[f"grad {name}"] = parameter.grad.clone()
    return result


def real_tokens(inputs: dict) -> torch.Tensor:
    """(B, N) bool: where the logits are of a token, as the mask says, or the labels of other length."""
    mask, labels = inputs.get("attention_mask"), inputs["labels"]
    return (
        labels != -100 if mask is None or (labels.dim() == 2 and labels.shape != mask.shape) else mask.bool()
    )


def deviation(result: dict, expected: dict) -> dict[str, float]:
    """Largest difference in logits, loss and gradients, each relative to the largest expected value.

    Gradients share one scale: a key bias has none in exact arithmetic, and rounding is all it holds.
    """
    assert result.keys() == expected.keys()
    scale = max(
        (value.abs().max().item() for name, value in expected.items() if name[:4] == "grad"), default=1.0
    )
    worst = {"logits": 0.0, "loss": 0.0, "grad": 0.0}
    for name, value in expected.items():
        kind = name.split()[0]
        difference = (result[name].float() - value.float()).abs().max().item()
        assert difference == difference, f"{name} is not a number"
        worst[kind] = max(worst[kind], difference / (scale if kind == "grad" else value.abs().max().item()))
    return worst


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares nothing."""
    return copy.deepcopy(model)


# ---- the zoo: every family that patch supports, for the matrix in test_hf_families.py ----


@dataclass(frozen=True)
class Specimen:
    """Small models of one family."""

    # "encoder", "decoder", "vision", "encoder-decoder" or "speech": what is fed to it, see training_inputs
    kind: str
    config: str  # class of its config
    heads: tuple[str, ...]  # classes of models with a head; the first one generates and takes LoRA
    settings: dict  # of the config
    lora: tuple[str, ...] = ("q_proj", "v_proj")  # modules that LoRA adapts


_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BERT_LIKE = {**_SIZES, "num_hidden_layers": 2, "num_labels": 3}
_LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_labels": 3,
    **_SPECIAL,
}
_T5_LIKE = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,  # few and near, so that short sequences meet every kind
    "relative_attention_max_distance": 12,
    "dropout_rate": 0.0,
    "num_labels": 3,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_BART_LIKE = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "scale_embedding": True,
    "decoder_start_token_id": 1,
    **_SPECIAL,
}
FRAMES = 19  # positions of a recording behind Whisper's convolutions, which halve them
_MIXED = ["sliding_attention", "full_attention"]
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5, "layer_types": _MIXED}


def _heads(prefix: str, *heads: str) -> tuple[str, ...]:
    return tuple(prefix + head for head in heads)


def _causal(prefix: str) -> tuple[str, ...]:
    return _heads(f"{prefix}For", "CausalLM", "SequenceClassification")


ZOO = {
    "bert": Specimen(
        "encoder",
        "BertConfig",
        _heads("BertFor", "TokenClassification", "SequenceClassification", "MaskedLM"),
        _BERT_LIKE,
        ("query", "value"),
    ),
    "roberta": Specimen(
        "encoder",
        "RobertaConfig",
        _heads("RobertaFor", "TokenClassification", "SequenceClassification", "MaskedLM"),
        {**_BERT_LIKE, "max_position_embeddings": 70},
        ("query", "value"),
    ),
    "xlm-roberta": Specimen(
        "encoder",
        "XLMRobertaConfig",
        _heads("XLMRobertaFor", "TokenClassification", "SequenceClassification", "MaskedLM"),
        {**_BERT_LIKE, "max_position_embeddings": 70},
        ("query", "value"),
    ),
    "distilbert": Specimen(
        "encoder",
        "DistilBertConfig",
        _heads("DistilBertFor", "TokenClassification", "SequenceClassification", "MaskedLM"),
        {
            **{_DISTIL_NAMES.get(name, name): value for name, value in _BERT_LIKE.items()},
            "seq_classif_dropout": 0.0,
        },
        ("q_lin", "v_lin"),
    ),
    "electra": Specimen(
        "encoder",
        "ElectraConfig",
        _heads("ElectraFor", "TokenClassification", "SequenceClassification", "MaskedLM"),
        {**_BERT_LIKE, "embedding_size": 24},
        ("query", "value"),
    ),
    "albert": Specimen(
        "encoder",
        "AlbertConfig",
        _heads("AlbertFor", "TokenClassification", "SequenceClassification", "MaskedLM"),
        # Four layers are run, in two groups that hold two layers each.
        {
            **_BERT_LIKE,
            "embedding_size": 24,
            "num_hidden_layers": 4,
            "num_hidden_groups": 2,
            "inner_group_num": 2,
            "classifier_dropout_prob": 0.0,
        },
        ("query", "value"),
    ),
    "modernbert": Specimen(
        "encoder",
        "ModernBertConfig",
        _heads("ModernBertFor", "TokenClassification", "SequenceClassification", "MaskedLM"),
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 64,
            "global_attn_every_n_layers": 2,  # global, local, global
            "local_attention": 8,
            "classifier_pooling": "mean",  # "cls": test_hf_encoders.py
            "num_labels": 3,
            **_SPECIAL,
        },
        ("Wqkv",),
    ),
    "vit": Specimen(
        "vision",
        "ViTConfig",
        ("ViTForImageClassification",),
        {**_BERT_LIKE, "image_size": 12, "patch_size": 3},
        ("q_proj", "v_proj", "query", "value"),
    ),
    "gpt2": Specimen(
        "decoder",
        "GPT2Config",
        ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "num_labels": 3,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            **_SPECIAL,
        },
        ("c_attn",),
    ),
    "opt": Specimen(
        "decoder",
        "OPTConfig",
        _heads("OPTFor", "CausalLM", "SequenceClassification"),
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 24,
            "dropout": 0.0,
            "num_labels": 3,
            **_SPECIAL,
        },
    ),
    "llama": Specimen("decoder", "LlamaConfig", _causal("Llama"), _LLAMA_LIKE),
    "mistral": Specimen("decoder", "MistralConfig", _causal("Mistral"), {**_LLAMA_LIKE, "sliding_window": 5}),
    "qwen2": Specimen(
        "decoder",
        "Qwen2Config",
        _causal("Qwen2"),
        {**_LLAMA_LIKE, "use_sliding_window": True, "sliding_window": 5, "layer_types": _MIXED},
    ),
    "qwen3": Specimen("decoder", "Qwen3Config", _causal("Qwen3"), {**_LLAMA_LIKE, "head_dim": 8}),
    "gemma2": Specimen(
        "decoder",
        "Gemma2Config",
        _causal("Gemma2"),
        {**_LLAMA_LIKE, **_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    ),
    "gemma3_text": Specimen(
        "decoder",
        "Gemma3TextConfig",
        ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
        {**_LLAMA_LIKE, **_GEMMA},
    ),
    "phi3": Specimen(
        "decoder", "Phi3Config", _causal("Phi3"), {**_LLAMA_LIKE, "sliding_window": 5}, ("qkv_proj",)
    ),
    "gpt_neo": Specimen(
        "decoder",
        "GPTNeoConfig",
        _heads("GPTNeoFor", "CausalLM", "SequenceClassification"),
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            # Less than a batch's 23; narrower than a static cache, see test_hf_own_attention.py.
            "window_size": 16,
            "max_position_embeddings": 128,
            "num_labels": 3,
            **_SPECIAL,
        },
    ),
    "gptj": Specimen(
        "decoder",
        "GPTJConfig",
        _heads("GPTJFor", "CausalLM", "SequenceClassification"),
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_inner": 48,
            "n_layer": 2,
            "n_head": 4,
            "rotary_dim": 4,
            "n_positions": 128,
            "num_labels": 3,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "tie_word_embeddings": False,
            **_SPECIAL,
        },
    ),
    **{
        model_type: Specimen(
            "encoder-decoder",
            f"{prefix}Config",
            _heads(f"{prefix}For", "ConditionalGeneration", "SequenceClassification"),
            _T5_LIKE,
            ("q", "v"),
        )
        for model_type, prefix in (("t5", "T5"), ("mt5", "MT5"))
    },
    "bart": Specimen(
        "encoder-decoder",
        "BartConfig",
        _heads("BartFor", "ConditionalGeneration", "SequenceClassification"),
        {**_BART_LIKE, "max_position_embeddings": 64, "num_labels": 3},
    ),
    "marian": Specimen(
        "encoder-decoder",
        "MarianConfig",
        ("MarianMTModel",),
        {**_BART_LIKE, "max_position_embeddings": 64, "tie_word_embeddings": False},
    ),
    "whisper": Specimen(
        "speech",
        "WhisperConfig",
        ("WhisperForConditionalGeneration",),
        {
            **_BART_LIKE,
            "num_mel_bins": 8,
            "max_source_positions": FRAMES,
            "max_target_positions": 64,
            "tie_word_embeddings": False,
            "begin_suppress_tokens": None,
            "suppress_tokens": None,
        },
    ),
}


def specimen(name: str, head: str | None = None, seed: int = 0, **changes) -> nn.Module:
    """A small model of that family in eval mode, unpatched, with eager attention; the first head if none is
    named."""
    kind = ZOO[name]
    config = getattr(transformers, kind.config)(**{**kind.settings, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    return _stirred(getattr(transformers, head or kind.heads[0])(config).eval())


def training_inputs(name: str, head: str | None = None, padding: str = "none", **sizes) -> dict:
    """Inputs with labels for one of the family's models; padding as in batch."""
    kind, head = ZOO[name], head or ZOO[name].heads[0]
    inputs = batch(padding, **sizes)
    if kind.kind == "encoder":
        return {**inputs, "labels": labels_for(head.split("For")[1], inputs)}
    if kind.kind == "decoder":
        hidden = inputs["attention_mask"] == 0
        inputs["input_ids"] = inputs["input_ids"].masked_fill(hidden, 0)
        if head.endswith("SequenceClassification"):
            return {**inputs, "labels": labels_for("SequenceClassification", inputs)}
        # What predicts the first token is padding on the left, and no two implementations agree on that.
        hidden |= (inputs["attention_mask"].cumsum(1) == 1) & (padding == "left")
        return {**inputs, "labels": inputs["input_ids"].masked_fill(hidden, -100)}
    if kind.kind == "vision":
        return {"pixel_values": torch.randn(5, 3, 12, 12), "labels": torch.arange(5) % 3}
    hidden = inputs["attention_mask"] == 0
    if head.endswith("SequenceClassification"):
        # Its head reads the decoder at the end-of-sequence token.
        last = (inputs["attention_mask"] * torch.arange(1, hidden.shape[1] + 1)).argmax(1)
        inputs["input_ids"][torch.arange(len(last)), last] = _T5_LIKE["eos_token_id"]
        labels = labels_for("SequenceClassification", inputs)
    else:  # fewer target tokens than source tokens
        target = batch(padding, **{**sizes, "length": sizes.get("length", 23) - 6})
        labels = labels_for("MaskedLM", target)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(hidden, 0)
    return {**(recordings(len(hidden)) if kind.kind == "speech" else inputs), "labels": labels}


def recordings(size: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """What Whisper is given; all are of one length."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_features": torch.randn(size, 8, 2 * FRAMES, generator=generator)}
