"""Whatever peft does to a model, patched before or after it: loss and gradients of the unpatched one."""

import copy
import io

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
from zoo import BACKEND, deviation, run, specimen, training_inputs

from fastattn.hf import patch, unpatch

# The head that is trained, peft's task, linear layers of attention and of the MLP, a norm.
MODELS = {
    "bert": (
        "BertForSequenceClassification",
        "SEQ_CLS",
        ["query", "value"],
        ["intermediate.dense"],
        "LayerNorm",
    ),
    "llama": ("LlamaForCausalLM", "CAUSAL_LM", ["q_proj", "v_proj"], ["down_proj"], "norm"),
    "t5": ("T5ForConditionalGeneration", "SEQ_2_SEQ_LM", ["q", "v"], ["wo"], "layer_norm"),
}
_SAVED = {"bert": "pooler", "llama": "lm_head", "t5": "lm_head"}


def _lora(name: str, **options) -> peft.PeftConfig:
    _, task, attention, mlp, _ = MODELS[name]
    defaults = {"task_type": task, "r": 2, "target_modules": attention + mlp, "init_lora_weights": False}
    return peft.LoraConfig(**{**defaults, **options})


def _ia3(name: str) -> peft.PeftConfig:
    _, task, attention, mlp, _ = MODELS[name]
    return peft.IA3Config(task_type=task, target_modules=attention + mlp, feedforward_modules=mlp)


def _prompting(kind: type, **options):
    return lambda name: kind(task_type=MODELS[name][1], num_virtual_tokens=3, **options)


def _on_attention(kind: type, **options):
    return lambda name: kind(task_type=MODELS[name][1], target_modules=MODELS[name][2], **options)


METHODS = {
    "LoRA": _lora,
    "LoRA, one layer": lambda name: _lora(name, layers_to_transform=[1]),
    "LoRA, biases": lambda name: _lora(name, bias="all"),
    "LoRA, its own biases": lambda name: _lora(name, bias="lora_only"),
    "LoRA, lora_bias": lambda name: _lora(name, lora_bias=name == "bert"),
    "rsLoRA": lambda name: _lora(name, use_rslora=True),
    "DoRA": lambda name: _lora(name, use_dora=True),
    "LoRA, all linear layers": lambda name: _lora(name, target_modules="all-linear"),
    "LoRA, modules_to_save": lambda name: _lora(name, modules_to_save=[_SAVED[name]]),
    "IA3": _ia3,
    "LoHa": _on_attention(peft.LoHaConfig, r=2, init_weights=False),
    "OFT": _on_attention(peft.OFTConfig, oft_block_size=8, r=0, init_weights=False),
    "norms": lambda name: peft.LNTuningConfig(task_type=MODELS[name][1], target_modules=[MODELS[name][4]]),
    "prefix": _prompting(peft.PrefixTuningConfig),
    "prefix, projected": _prompting(peft.PrefixTuningConfig, prefix_projection=True, encoder_hidden_size=16),
    "prompt": _prompting(peft.PromptTuningConfig),
    "P-tuning": _prompting(peft.PromptEncoderConfig, encoder_hidden_size=16),
}


def adapted(name: str, config: peft.PeftConfig, order: str) -> torch.nn.Module:
    """The same weights whatever the order: "before", "after", or "never" patched."""
    model = specimen(name, MODELS[name][0]).train()
    torch.manual_seed(0)
    if order == "before":
        patch(model, backend=BACKEND)
    model = peft.get_peft_model(model, config)
    return patch(model, backend=BACKEND) if order == "after" else model


def inputs_for(name: str) -> dict[str, torch.Tensor]:
    return training_inputs(name, MODELS[name][0], "right")


def compare(model: torch.nn.Module, theirs: torch.nn.Module, inputs: dict) -> dict:
    expected = run(theirs, inputs)
    assert max(deviation(run(model, inputs), expected).values()) <= 1e-5
    return expected


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name, method, order):
    inputs = inputs_for(name)
    theirs = adapted(name, METHODS[method](name), "never")
    trained = [key for key, parameter in theirs.named_parameters() if parameter.requires_grad]
    model = adapted(name, METHODS[method](name), order)
    found = compare(model, theirs, inputs)
    assert trained
    assert {key.removeprefix("grad ") for key in found if key.startswith("grad ")} <= set(trained)
    assert any(found[f"grad {key}"].any() for key in trained if f"grad {key}" in found)
    assert max(deviation(run(unpatch(model), inputs), run(theirs, inputs)).values()) == 0


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", MODELS)
def test_adapters_by_turns_together_merged_and_off(name, order):
    """One model, and all that can be done with its adapters; each time as unpatched."""
    inputs = inputs_for(name)
    models = []
    for when in ("never", order):
        # No task: peft would train a classifier for each adapter, of which there is but one at a time.
        model = adapted(name, _lora(name, task_type=None), when)
        model.add_adapter("second", _lora(name, task_type=None, r=3, target_modules=MODELS[name][2]))
        models.append(model)
    theirs, model = models
    first = compare(model, theirs, inputs)

    for each in models:
        each.set_adapter("second")
    second = compare(model, theirs, inputs)
    assert not torch.equal(first["logits"], second["logits"])
    assert not any("default" in key for key in second)

    for each in models:
        each.base_model.set_adapter(["default", "second"])
    stacked = compare(model, theirs, inputs)
    assert {part in key for key in stacked for part in ("default", "second")} == {True, False}

    with torch.no_grad(), theirs.disable_adapter(), model.disable_adapter():
        off, expected = model(**inputs).loss, theirs(**inputs).loss
    torch.testing.assert_close(off, expected, rtol=1e-5, atol=0)
    assert abs(off - stacked["loss"]) > 1e-3 * off
    compare(model, theirs, inputs)  # and on again

    for each in models:
        each.merge_adapter(["default"])
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).loss, theirs(**inputs).loss, rtol=1e-5, atol=0)
    for each in models:
        each.unmerge_adapter()
    compare(model, theirs, inputs)

    plain, expected = model.merge_and_unload(), theirs.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).loss, expected(**inputs).loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(unpatch(plain)(**inputs).loss, expected(**inputs).loss, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_saved_adapters_load_into_a_patched_model(name, tmp_path):
    inputs = inputs_for(name)
    theirs = adapted(name, _lora(name), "never")
    theirs.save_pretrained(tmp_path)
    model = patch(specimen(name, MODELS[name][0]).train(), backend=BACKEND)
    model = peft.PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    compare(model, theirs, inputs)


@pytest.mark.parametrize("copier", ["deepcopy", "torch.save"])
@pytest.mark.parametrize("name", MODELS)
def test_copies_of_a_patched_model(name, copier):
    """They are patched, train as the original does, and unpatch alone."""
    inputs = inputs_for(name)
    theirs, model = adapted(name, _lora(name), "never"), adapted(name, _lora(name), "after")
    compare(model, theirs, inputs)
    if copier == "deepcopy":
        duplicate = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        duplicate = torch.load(file, weights_only=False)
    expected = compare(duplicate, theirs, inputs)
    assert max(deviation(run(unpatch(duplicate), inputs), expected).values()) == 0
    found = run(model, inputs)
    assert 0 < max(deviation(found, expected).values()) <= 1e-5  # patched still: rounded otherwise
