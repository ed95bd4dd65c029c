"""Rotary positions in patched models: by fastattn's op, in this model alone, and back to transformers'."""

import copy
import importlib
import logging
import pickle
import re

import pytest
import torch

pytest.importorskip("transformers")
from measures import saved_bytes
from torch import nn
from zoo import BACKEND, ZOO, deviation, run, specimen, training_inputs, twin

import fastattn
from fastattn import dispatch, log
from fastattn.hf import patch, rotary, unpatch
from fastattn.hf.families import find_family

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "modernbert")
pytestmark = pytest.mark.skipif(BACKEND == "reference", reason="the native CPU library is not built")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch, caplog):
    monkeypatch.setattr(log, "_said", set())
    caplog.set_level(logging.WARNING, logger="fastattn")


@pytest.fixture
def turned(monkeypatch):
    """Shapes of what the op turns, one list a call."""
    calls, backend = [], dispatch.load("cpu")

    def noted(xs, *rest, own=backend.rotary):
        calls.append([tuple(x.shape) for x in xs])
        own(xs, *rest)

    monkeypatch.setattr(backend, "rotary", noted)
    return calls


def module_of(model: nn.Module):
    """The module of transformers that the model's classes are in."""
    return importlib.import_module(type(unpatched_attention(model)).__module__)


def unpatched_attention(model: nn.Module) -> nn.Module:
    base = next(m for m in model.modules() if find_family(m.config.model_type).is_base(m))
    return find_family(base.config.model_type).attention_modules(base)[0]


def test_the_families_that_turn():
    assert set(FAMILIES) == {name for name in ZOO if getattr(find_family(name), "rotary", False)}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("padding", ["none", "right"])
def test_every_layer_by_one_call(name, padding, turned, caplog):
    model = specimen(name).train()
    inputs = training_inputs(name, padding=padding)
    expected = run(model, inputs)
    assert not turned
    changed = patch(twin(model), recompute="none")
    layers = changed.config.num_hidden_layers
    assert rotary.rotating(changed) == layers
    assert max(deviation(run(changed, inputs), expected).values()) <= 1e-5
    assert len(turned) == 2 * layers  # forward and backward
    assert all(len(call) == 2 for call in turned)
    assert "transformers' own" not in caplog.text
    turned.clear()
    run(model, inputs)
    assert not turned
    unpatch(changed)
    assert max(deviation(run(changed, inputs), expected).values()) == 0
    assert not turned
    assert type(unpatched_attention(changed)) is type(unpatched_attention(model))


def test_partial_rotation(turned):
    """Phi 4 mini turns a part of each head."""
    model = specimen("phi3", partial_rotary_factor=0.5).train()
    inputs = training_inputs("phi3")
    expected = run(model, inputs)
    assert max(deviation(run(patch(twin(model)), inputs), expected).values()) <= 1e-5
    assert turned


def test_saved_for_backward_are_neither_q_nor_k():
    """With what a frozen projection makes computed again, so is what is turned."""
    model = specimen("llama").train().requires_grad_(False)
    model.model.embed_tokens.requires_grad_(True)
    inputs = {**training_inputs("llama"), "use_cache": False}  # a cache copies k
    expected = run(model, inputs)

    def saved(changed):
        return [saved_bytes(changed, inputs) for _ in range(2)][1]  # in the first, recompute makes its plan

    changed = patch(twin(model), recompute="all")
    assert max(deviation(run(changed, inputs), expected).values()) <= 1e-5
    ours = saved(changed)
    rotary.restore_rotary(changed)
    theirs = saved(changed)
    config, tokens = model.config, inputs["input_ids"].numel()
    heads = config.num_attention_heads + config.num_key_value_heads
    head_dim = config.hidden_size // config.num_attention_heads
    assert theirs - ours == config.num_hidden_layers * tokens * heads * head_dim * 4


@pytest.mark.parametrize("mode", ["all", "auto", "none"])
def test_recomputed_gradients_are_the_same_to_the_bit(mode):
    model = specimen("qwen3").train()
    inputs = training_inputs("qwen3")
    expected = run(patch(twin(model), recompute="none"), inputs)
    changed = patch(twin(model), recompute=mode)
    for _ in range(2):
        changed.zero_grad()
        assert max(deviation(run(changed, inputs), expected).values()) == 0


def test_copies_and_pickles_turn_too(turned):
    model = patch(specimen("llama"))
    inputs = training_inputs("llama")
    expected = model(**inputs).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        turned.clear()
        assert torch.equal(copied(**inputs).logits, expected)
        assert len(turned) == model.config.num_hidden_layers
        assert rotary.rotating(unpatch(copied)) == 0
    assert rotary.rotating(model) == model.config.num_hidden_layers


def test_compiled_is_what_transformers_computes(turned):
    """A compiler fuses transformers' operations itself; the op is not in its way."""
    model = specimen("llama", attention_dropout=0.0)
    inputs = {"input_ids": training_inputs("llama")["input_ids"]}
    with torch.no_grad():
        expected = model(**inputs).logits
        compiled = torch.compile(patch(model), backend="eager", fullgraph=True)
        found = compiled(**inputs, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not turned


def test_under_autocast(turned):
    model = specimen("llama").train()
    inputs = training_inputs("llama")
    exact = run(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = deviation(run(model, inputs), exact)
        ours = deviation(run(patch(twin(model)), inputs), exact)
    assert turned
    assert all(ours[name] <= 2 * plain[name] + 1e-3 for name in ours)


def test_what_the_op_does_not_take_is_left_to_transformers(turned, caplog):
    model = specimen("llama").double()
    inputs = training_inputs("llama")
    changed = patch(twin(model), backend="reference")
    assert torch.allclose(changed(**inputs).logits, model(**inputs).logits, atol=1e-6)
    assert not turned
    assert "rotary positions are transformers' own: q is torch.float64" in caplog.text


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda q, k, cos, sin, unsqueeze_dim=1: (q * 2, k), "computes something else"),
        (lambda q, k, cos, sin, unsqueeze_dim=1: q @ k, "Expected size"),
        (lambda query, key, cos, sin: (query, key), r"takes \(query, key, cos, sin"),
    ],
)
def test_another_transformers_keeps_its_own(monkeypatch, caplog, function, reason):
    """Replaced by another library, or rebuilt: a reason in the log, and the model as it was."""
    model = specimen("mistral")
    inputs = training_inputs("mistral")
    monkeypatch.setattr(module_of(model), "apply_rotary_pos_emb", function)
    patch(model)
    assert rotary.rotating(model) == 0
    assert re.search(rf"rotary positions of MistralAttention are transformers' own: .*{reason}", caplog.text)
    if "something" in reason:
        unpatched = specimen("mistral")
        assert torch.allclose(model(**inputs).logits, unpatched(**inputs).logits, atol=1e-5)


def test_an_attention_with_another_forward_keeps_it(caplog):
    model = specimen("llama")
    attention = model.model.layers[0].self_attn
    attention.forward = attention.forward
    patch(model)
    assert rotary.rotating(model) == model.config.num_hidden_layers - 1
    assert "LlamaAttention are transformers' own: its forward was replaced" in caplog.text

    class Own(type(specimen("llama").model.layers[0].self_attn)):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            return super().forward(hidden_states, attention_mask=attention_mask, **kwargs)

    model = specimen("llama")
    model.model.layers[0].self_attn.__class__ = Own
    patch(model)
    assert type(model.model.layers[0].self_attn) is Own
    assert "Own are transformers' own: its forward calls no apply_rotary_pos_emb" in caplog.text


def test_explain_names_it():
    model = specimen("llama").train()
    inputs = training_inputs("llama")
    assert "rotary" not in str(fastattn.hf.explain(model, inputs))
    explanation = fastattn.hf.explain(patch(model), inputs)
    layers = model.config.num_hidden_layers
    assert explanation.rotary_layers == layers
    assert f"rotary positions: {layers} layers by fastattn.rotary" in str(explanation)
