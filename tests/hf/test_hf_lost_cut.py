"""Frozen layers at the bottom: who makes backward run through them is told so, and nobody else."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
from measures import saved_bytes
from zoo import BACKEND, ZOO, specimen, training_inputs

from fastattn.hf import explain, patch

SAID = "layers train nothing, yet backward runs through them"
FAMILIES = ("bert", "albert", "llama", "gptj", "opt", "t5", "bart", "vit")


@pytest.fixture
def said(monkeypatch, caplog):
    monkeypatch.setattr("fastattn.log._said", set())
    return lambda: [record.getMessage() for record in caplog.records if SAID in record.getMessage()]


def top_trained(name: str) -> torch.nn.Module:
    """The last layer of each stack trains, with the embeddings and all other layers frozen."""
    settings = {"num_hidden_groups": 2} if name == "albert" else {}
    model = specimen(name, **settings).train().requires_grad_(False)
    outer = []
    for path, layers in model.named_modules():
        inside = any(path.startswith(f"{other}.") for other in outer)
        if (
            isinstance(layers, torch.nn.ModuleList)
            and not inside
            and next(layers.parameters(), None) is not None
        ):
            outer.append(path)
            layers[-1].requires_grad_(True)
    return model


def hooked(model: torch.nn.Module, way: str) -> torch.nn.Module:
    if way == "transformers":
        model.enable_input_require_grads()
    else:
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    return model


def inputs_of(name: str) -> dict:
    return training_inputs(name, padding="none" if ZOO[name].kind == "vision" else "right")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_hook_on_the_embeddings(name, said):
    model, inputs = patch(top_trained(name), backend=BACKEND), inputs_of(name)
    assert not explain(model, inputs).notes
    before = saved_bytes(model, inputs)
    assert not said()
    assert saved_bytes(hooked(model, "transformers"), inputs) > before
    assert said()
    assert f"the first {2 if name == 'albert' else 1} layers" in said()[0]  # a group of albert's has two
    assert "nothing here needs that" in said()[0]
    explained = explain(model, inputs)
    assert len(explained.notes) == len(said())
    assert f"note: {explained.notes[0]}" in str(explained)
    count = len(said())
    saved_bytes(model, inputs)
    assert len(said()) == count
    model.disable_input_require_grads()
    assert not explain(model, inputs).notes
    assert saved_bytes(model, inputs) == before


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["bert", "llama", "gptj", "t5"])
def test_with_gradient_checkpointing(name, reentrant, said):
    """The kind that needs the hook is told of the other."""
    model, inputs = patch(hooked(top_trained(name), "own"), backend=BACKEND), inputs_of(name)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(**inputs).loss.backward()
    assert len(said()) == 1
    assert ("reentrant checkpointing needs that" in said()[0]) == reentrant


def test_unpatched_models_are_explained_likewise(said):
    model = top_trained("llama")
    assert not explain(model, inputs_of("llama")).notes
    assert SAID in explain(hooked(model, "own"), inputs_of("llama")).notes[0]
    assert not said()


def _trained_embeddings(model):
    model.get_input_embeddings().requires_grad_(True)
    return model


def _prompt(model):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.get_peft_model(model, config).train()


def _lora(model):
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).train()


@pytest.mark.parametrize("change", [_trained_embeddings, _prompt, _lora, lambda model: model.eval()])
@pytest.mark.parametrize("order", ["before", "after"])
def test_who_asks_for_these_gradients_is_not_told(change, order, said):
    """Trained embeddings or prompts; adapters in the first layer; and nothing happens without gradients."""
    model = hooked(top_trained("llama"), "own")
    model = (
        change(patch(model, backend=BACKEND)) if order == "before" else patch(change(model), backend=BACKEND)
    )
    inputs = inputs_of("llama")
    with torch.set_grad_enabled(model.training):
        model(**inputs)
    assert not said()


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_gradient_of_inputs_given_is_not_told(reentrant, said):
    model, inputs = patch(top_trained("llama"), backend=BACKEND), inputs_of("llama")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).requires_grad_(True)
    model(inputs_embeds=embedded, **inputs).loss.backward()
    assert embedded.grad is not None
    assert not explain(model, {"inputs_embeds": embedded, **inputs}).notes
    assert not said()


def test_reentrant_checkpointing_of_trained_embeddings_is_not_told(said):
    """Its second pass, on detached inputs, looks as if nobody had asked."""
    model = patch(_trained_embeddings(top_trained("llama")), backend=BACKEND)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(**inputs_of("llama")).loss.backward()
    assert model.get_input_embeddings().weight.grad is not None
    assert not said()
