"""Causal decoders, patched: training without padding, inference with a cache, exact either way."""

import ctypes
import logging

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from zoo import BACKEND, VOCAB, batch, decoder, deviation, run, specimen, twin

from fastattn import log
from fastattn.backends.cpu import abi
from fastattn.errors import UnsupportedError
from fastattn.hf import patch, unpatch

DECODERS = ("gpt2", "llama")
pytestmark = pytest.mark.skipif(BACKEND == "reference", reason="the native CPU library is not built")


def causal_labels(inputs: dict) -> dict:
    """What collators give: the tokens themselves, -100 at padding."""
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def layer_shapes(model, inputs, **options) -> set:
    """Shapes of the hidden states that the second layer sees."""
    base = getattr(model, model.base_model_prefix)
    seen = set()
    layers = base.h if hasattr(base, "h") else base.layers
    handle = layers[1].register_forward_pre_hook(lambda _, args: seen.add(tuple(args[0].shape[:2])))
    model(**inputs, **options)
    handle.remove()
    return seen


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("kind", DECODERS)
def test_language_modelling(kind, padding):
    inputs = causal_labels(batch(padding))
    model = decoder(kind).train()
    # On the left, padding predicts the first token from no key at all: 0 in sdpa and here, a mean in eager.
    model.set_attn_implementation("sdpa")
    expected = run(model, inputs)
    changed = patch(twin(model), backend=BACKEND)
    assert max(deviation(run(changed, inputs), expected).values()) <= 1e-5
    # the first real token on the left, and the one behind a hole, are predicted from padding
    exact_without = padding == "right"
    packed = (1, int(inputs["attention_mask"].sum()))
    assert layer_shapes(changed, inputs) == {packed if exact_without else (5, 23)}
    unpatch(changed)
    assert max(deviation(run(changed, inputs), expected).values()) == 0


@pytest.mark.parametrize("kind", DECODERS)
def test_left_padding_goes_where_no_label_needs_it(kind):
    inputs = causal_labels(batch("left"))
    first = inputs["attention_mask"].argmax(1)
    inputs["labels"][torch.arange(5), first] = -100
    model = decoder(kind).train()
    expected = run(model, inputs)
    changed = patch(twin(model), backend=BACKEND, padding_free=True)
    assert max(deviation(run(changed, inputs), expected).values()) <= 1e-5
    assert layer_shapes(changed, inputs) == {(1, int(inputs["attention_mask"].sum()))}


@pytest.mark.parametrize("kind", DECODERS)
def test_labels_without_minus_100(kind, monkeypatch, caplog):
    """labels=input_ids, padding and all, is common; transformers counts it, so it is computed."""
    monkeypatch.setattr(log, "_said", set())
    caplog.set_level(logging.WARNING, logger="fastattn")
    inputs = batch("right")
    inputs["labels"] = inputs["input_ids"]
    model = decoder(kind).train()
    expected = run(model, inputs)
    changed = patch(twin(model), backend=BACKEND)
    assert max(deviation(run(changed, inputs), expected).values()) <= 1e-5
    assert "label other than -100" in caplog.text
    with pytest.raises(UnsupportedError, match="label other than -100"):
        patch(twin(model), backend=BACKEND, padding_free=True)(**inputs)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", DECODERS)
def test_positions_given_by_the_caller(kind, padding):
    inputs = batch(padding)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    real = inputs["attention_mask"].bool()
    model = decoder(kind)
    expected = model(**inputs, use_cache=False, output_hidden_states=True)
    changed = patch(twin(model), backend=BACKEND, padding_free=True)
    out = changed(**inputs, use_cache=False, output_hidden_states=True)
    torch.testing.assert_close(out.logits[real], expected.logits[real], rtol=1e-5, atol=2e-5)
    for ours, theirs in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", DECODERS)
def test_sequence_classification_reads_the_last_token(kind, padding):
    inputs = batch(padding)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 0)
    inputs["labels"] = torch.arange(5) % 3
    model = decoder(kind, "SequenceClassification", num_labels=3).train()
    expected = run(model, inputs)
    changed = patch(twin(model), backend=BACKEND, padding_free=True)
    assert max(deviation(run(changed, inputs), expected).values()) <= 1e-5
    # a pad token that the mask keeps, or padding that is no pad token: the head reads padding
    inputs["input_ids"][:, -1] = inputs["input_ids"][:, 0] = 7
    expected = run(model, inputs)
    changed = patch(twin(model), backend=BACKEND)
    assert max(deviation(run(changed, inputs), expected).values()) <= 1e-5


@pytest.mark.parametrize("kind", DECODERS)
def test_gradient_checkpointing(kind):
    inputs = causal_labels(batch("right"))
    model = decoder(kind).train()
    expected = run(model, inputs)
    patch(model, backend=BACKEND)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert max(deviation(run(model, inputs), expected).values()) <= 1e-5


def test_generate_shares_the_keys_out(cpu, monkeypatch):
    """Behind a long prompt one sample's keys are parts of the work: the kernel asks for more threads than it
    has heads to give them."""
    asked, long = [], 1030

    @ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 2)
    def refuse(begin, end, grain, function, context):
        asked.append(end)
        return 1  # the library does the work itself

    address = ctypes.cast(refuse, ctypes.c_void_p).value
    model = specimen("llama", max_position_embeddings=2048)
    inputs = batch("none", size=1, length=long)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": VOCAB, "disable_compile": True}
    expected = model.generate(**inputs, **options)
    patch(model, backend="cpu")
    steps = []

    def note_step(*_) -> None:
        steps.append(list(asked))
        asked.clear()

    model.lm_head.register_forward_hook(note_step)
    monkeypatch.setattr(cpu, "_executors", {torch.get_num_threads(): abi.executor_struct(address, 64)})
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert len(steps) == 4
    kv_heads, layers = model.config.num_key_value_heads, model.config.num_hidden_layers
    for step in steps[1:]:
        assert sum(end > kv_heads for end in step) == layers


def test_a_forward_in_eval_mode_returns_its_cache():
    model = patch(decoder("llama"), backend=BACKEND)
    assert model(**batch("right")).past_key_values is not None
    assert model(**batch("right"), use_cache=False).past_key_values is None


@pytest.mark.parametrize("kind", DECODERS)
def test_attention_weights(kind):
    inputs = batch("left")
    real = inputs["attention_mask"].bool()
    model = decoder(kind)
    expected = model(**inputs, output_attentions=True)
    out = patch(model, backend=BACKEND)(**inputs, output_attentions=True)
    torch.testing.assert_close(out.logits[real], expected.logits[real], rtol=1e-5, atol=2e-5)
    assert len(out.attentions) == 2
    rows = real[:, None, :, None].expand_as(out.attentions[1])
    torch.testing.assert_close(out.attentions[1][rows], expected.attentions[1][rows], rtol=1e-5, atol=1e-6)


def test_saved_models_load_plainly(tmp_path):
    model = decoder("llama")
    expected = model(**batch("right")).logits
    patch(model, backend=BACKEND).save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(plain(**batch("right")).logits, expected)


def test_a_window_counts_holes_as_distance():
    """Labels that need no padding are not enough where a packed row would bring tokens closer."""
    inputs = batch("holes")
    inputs["labels"] = torch.full_like(inputs["input_ids"], -100)
    inputs["labels"][:, 1] = inputs["input_ids"][:, 1]
    model = specimen("mistral")
    expected = run(model.train(), inputs)
    assert max(deviation(run(patch(twin(model), backend=BACKEND), inputs), expected).values()) <= 1e-5
    with pytest.raises(UnsupportedError, match="whose distances this model looks at"):
        patch(model, backend=BACKEND, padding_free=True)(**inputs)
