"""Encoder-decoder models, patched: no padding in either stack where that is exact, the same generation."""

import logging

import pytest
import torch

pytest.importorskip("transformers")

from seq2seq_zoo import FAMILIES, TEXT, run_seq2seq, seq2seq, sources, targets
from zoo import BACKEND, FRAMES, deviation, run, twin

from fastattn import log
from fastattn.errors import UnsupportedError, UnsupportedModelError
from fastattn.hf import patch, unpatch

pytestmark = pytest.mark.skipif(BACKEND == "reference", reason="the native CPU library is not built")


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What is logged once, as if nothing had been logged before."""
    monkeypatch.setattr(log, "_said", set())
    caplog.set_level(logging.INFO, logger="fastattn")
    return caplog


def stacks(model) -> tuple:
    """(encoder, decoder)"""
    return model.get_encoder(), model.get_decoder()


def last_layer(stack):
    return stack.block[-1] if hasattr(stack, "block") else stack.layers[-1]


def seen(model, inputs, base=None, **options) -> list[tuple]:
    """Shapes of the hidden states that the last layer of encoder and decoder (of base) get."""
    shapes, handles = [], []
    for stack in stacks(base or model):
        hook = last_layer(stack).register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape[:2]))
        handles.append(hook)
    model(**inputs, **options)
    for handle in handles:
        handle.remove()
    return [tuple(shape) for shape in shapes]


def real(labels) -> int:
    return int((labels != -100).sum())


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training(family, padding):
    inputs = {**sources(family, padding), "labels": targets()}
    model = seq2seq(family).train()
    expected = run_seq2seq(model, inputs)
    changed = patch(twin(model), backend=BACKEND)
    assert max(deviation(run_seq2seq(changed, inputs), expected).values()) <= 1e-5
    of_encoder = (5, FRAMES) if family == "whisper" else (1, int(inputs["attention_mask"].sum()))
    if padding == "none" and family != "whisper":
        of_encoder = (5, 23)
    if padding == "holes" and family in ("t5", "mt5"):
        of_encoder = (5, 23)  # distances count the masked positions
    assert seen(changed, inputs) == [of_encoder, (1, real(inputs["labels"]))]
    unpatch(changed)
    assert max(deviation(run_seq2seq(changed, inputs), expected).values()) == 0


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", TEXT)
def test_a_decoder_mask(family, padding):
    """In training and without a cache, a decoder mask counts as the encoder's does."""
    labels = targets()
    if padding == "left":
        labels = labels.flip(1)
    mask = (labels != -100).long()
    inputs = {**sources(family, padding), "labels": labels, "decoder_attention_mask": mask}
    model = seq2seq(family)
    for mode in (True, False):
        model.train(mode)
        expected = run_seq2seq(model, inputs, use_cache=False)
        changed = patch(twin(model), backend=BACKEND, padding_free=True)
        assert max(deviation(run_seq2seq(changed, inputs, use_cache=False), expected).values()) <= 1e-5
        assert seen(changed, inputs, use_cache=False)[1] == (1, real(labels))


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_at_masked_positions_count(family, warnings):
    inputs = {**sources(family), "labels": targets()}
    inputs["decoder_attention_mask"] = (inputs["labels"] != -100).long()
    inputs["labels"][1:, -1] = 7
    model = seq2seq(family).train()
    expected = run_seq2seq(model, inputs)
    changed = patch(twin(model), backend=BACKEND)
    assert max(deviation(run_seq2seq(changed, inputs), expected).values()) <= 1e-5
    assert seen(changed, inputs)[1] == (5, 11)
    assert "label other than -100" in warnings.text
    with pytest.raises(UnsupportedError, match="label other than -100"):
        patch(twin(model), backend=BACKEND, padding_free=True)(**inputs)


@pytest.mark.parametrize("family", TEXT)
def test_inference_keeps_every_output(family):
    """Without training nothing says that positions behind the last label are not looked at."""
    inputs = sources(family)
    decoder_ids = targets().masked_fill(targets() == -100, 0)
    model = seq2seq(family)
    changed = patch(twin(model), backend=BACKEND)
    for options in ({}, {"use_cache": False}, {"labels": targets(), "use_cache": False}):
        expected = model(**inputs, decoder_input_ids=decoder_ids, output_hidden_states=True, **options)
        out = changed(**inputs, decoder_input_ids=decoder_ids, output_hidden_states=True, **options)
        torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=2e-5)
        for ours, theirs in zip(out.decoder_hidden_states, expected.decoder_hidden_states, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
        kept = inputs["attention_mask"].bool()
        for ours, theirs in zip(out.encoder_hidden_states, expected.encoder_hidden_states, strict=True):
            torch.testing.assert_close(ours[kept], theirs[kept], rtol=1e-5, atol=2e-5)
        assert not out.encoder_last_hidden_state[~kept].any()
        assert (out.past_key_values is None) == (expected.past_key_values is None)


@pytest.mark.parametrize("family", TEXT)
def test_encoder_outputs_of_the_caller(family):
    inputs = sources(family)
    model = seq2seq(family).train()
    states = model.get_encoder()(**inputs).last_hidden_state.detach()
    inputs = {"encoder_outputs": (states,), "attention_mask": inputs["attention_mask"], "labels": targets()}
    expected = run_seq2seq(model, inputs)
    changed = patch(twin(model), backend=BACKEND, padding_free=True)
    assert max(deviation(run_seq2seq(changed, inputs), expected).values()) <= 1e-5
    keys = []
    layer = last_layer(changed.get_decoder())
    cross = layer.layer[1].EncDecAttention.k if hasattr(layer, "layer") else layer.encoder_attn.k_proj
    cross.register_forward_pre_hook(lambda _, args: keys.append(tuple(args[0].shape)))
    changed(**inputs)
    assert keys == [(1, int(inputs["attention_mask"].sum()), 32)]
    # padded states are never looked at
    inputs["encoder_outputs"] = (states.masked_fill(inputs["attention_mask"][..., None] == 0, float("nan")),)
    assert max(deviation(run_seq2seq(changed, inputs), expected).values()) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}],
    ids=["greedy", "beams", "static", "no-cache"],
)
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family, padding, options):
    inputs = sources(family, padding, size=3)
    model = seq2seq(family)
    options = {
        "max_new_tokens": 14,
        "do_sample": False,
        "eos_token_id": None,
        "disable_compile": True,
        **options,
    }
    expected = model.generate(**inputs, **options)
    assert torch.equal(patch(model, backend=BACKEND).generate(**inputs, **options), expected)


@pytest.mark.parametrize("family", ["t5", "mt5", "bart"])
def test_sequence_classification(family):
    inputs = sources(family)
    last = inputs["attention_mask"].sum(1) - 1
    inputs["input_ids"][torch.arange(5), last] = 2
    inputs["labels"] = torch.arange(5) % 3
    model = seq2seq(family, "ForSequenceClassification").train()
    for train_all in (True, False):
        model.requires_grad_(train_all)
        model.classification_head.requires_grad_(True)
        expected = run(model, inputs)
        changed = patch(twin(model), backend=BACKEND, padding_free=True)
        assert max(deviation(run(changed, inputs), expected).values()) <= 1e-5
        base = changed.transformer if family != "bart" else changed.model
        assert seen(changed, inputs, base) == [(1, int(inputs["attention_mask"].sum()))] * 2


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_encoder_alone(family, padding):
    inputs = sources(family, padding)
    kept = inputs["attention_mask"].bool()
    model = seq2seq(family, "EncoderModel")
    expected = model(**inputs).last_hidden_state
    out = patch(twin(model), backend=BACKEND, padding_free=True)(**inputs).last_hidden_state
    torch.testing.assert_close(out[kept], expected[kept], rtol=1e-5, atol=2e-5)
    assert not out[~kept].any()
    model = seq2seq(family, "ForTokenClassification").train()
    inputs["labels"] = (torch.arange(5 * 23).view(5, 23) % 3).masked_fill(~kept, -100)
    expected = run(model, inputs)
    changed = patch(twin(model), backend=BACKEND, padding_free=True)
    assert max(deviation(run(changed, inputs), expected).values()) <= 1e-5


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_question_answering_reads_every_position_of_its_decoder(family, warnings):
    inputs = {**sources(family), "start_positions": torch.arange(5), "end_positions": torch.arange(5) + 2}
    model = seq2seq(family, "ForQuestionAnswering", num_labels=2).train()
    expected = model(**inputs)
    out = patch(twin(model), backend=BACKEND)(**inputs)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.start_logits, expected.start_logits, rtol=1e-5, atol=2e-5)
    assert "head reads the output at padded positions" in warnings.text


@pytest.mark.parametrize("family", ["bart", "marian"])
def test_decoder_alone(family):
    """Its labels are not shifted: position i predicts label i."""
    inputs = sources(family)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model = seq2seq(family, "ForCausalLM").train()
    expected = run_seq2seq(model, inputs)
    changed = patch(twin(model), backend=BACKEND, padding_free=True)
    assert max(deviation(run_seq2seq(changed, inputs), expected).values()) <= 1e-5


def test_audio_classification():
    inputs = {**sources("whisper"), "labels": torch.arange(5) % 2}
    model = seq2seq("whisper", "ForAudioClassification", num_labels=2, use_weighted_layer_sum=True).train()
    expected = run(model, inputs)
    assert max(deviation(run(patch(model, backend=BACKEND), inputs), expected).values()) <= 1e-5


def test_whisper_says_that_it_has_no_padding(warnings):
    patch(seq2seq("whisper"), backend=BACKEND)
    assert "patched WhisperEncoder: 2 layers, backend auto, no padding" in warnings.text


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(family):
    inputs = {**sources(family), "labels": targets()}
    model = seq2seq(family).train()
    expected = run_seq2seq(model, inputs)
    patch(model, backend=BACKEND)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert max(deviation(run_seq2seq(model, inputs), expected).values()) <= 1e-5


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora(family, when):
    """On q and v of every attention; both factors get the unpatched gradients, and B moves."""
    peft = pytest.importorskip("peft")
    inputs = {**sources(family), "labels": targets()}
    targeted = ["q", "v"] if family in ("t5", "mt5") else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, target_modules=targeted)
    results, moved = [], []
    for change in (lambda model: model, lambda model: patch(model, backend=BACKEND)):
        model = seq2seq(family).train()
        torch.manual_seed(0)
        if when == "before":
            model = peft.get_peft_model(change(model), config)
        else:
            model = change(peft.get_peft_model(model, config))
        results.append(run_seq2seq(model, inputs))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch.optim.SGD(trained, lr=1.0).step()
        results.append(run_seq2seq(model, inputs))
        moved.append([p for name, p in model.named_parameters() if "lora_B" in name])
    assert max(deviation(results[2], results[0]).values()) <= 1e-5
    assert max(deviation(results[3], results[1]).values()) <= 1e-4
    # two projections of encoder, decoder and cross-attention in two layers each
    assert len(moved[1]) == 12
    assert all(p.abs().max() > 0 for p in moved[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_weights(family):
    inputs = {**sources(family), "decoder_input_ids": targets().masked_fill(targets() == -100, 0)}
    model = seq2seq(family)
    expected = model(**inputs, output_attentions=True)
    out = patch(model, backend=BACKEND)(**inputs, output_attentions=True)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=2e-5)
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        for ours, theirs in zip(getattr(out, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models_load_plainly(family, tmp_path):
    inputs = {**sources(family), "labels": targets()}
    model = seq2seq(family)
    expected = model(**inputs).logits
    patch(model, backend=BACKEND).save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(plain(**inputs).logits, expected)
    chosen = type(model).from_pretrained(tmp_path, attn_implementation="fastattn")
    torch.testing.assert_close(chosen(**inputs).logits, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_attention_chosen_after_patch_wins(family, warnings):
    inputs = {**sources(family), "labels": targets()}
    model = seq2seq(family).train()
    expected = run_seq2seq(model, inputs)
    patch(model, backend=BACKEND)
    for part in (model, model.get_encoder(), model.get_decoder()):  # old versions do not hand it down
        part.set_attn_implementation("sdpa")
    assert max(deviation(run_seq2seq(model, inputs), expected).values()) <= 1e-5
    if family != "whisper":
        assert "attn_implementation was set to 'sdpa'" in warnings.text
    unpatch(model)
    assert stacks(model)[0].config._attn_implementation == "sdpa"


def test_layers_left_out_at_random_keep_their_padding(warnings):
    inputs = {**sources("bart"), "labels": targets()}
    model = seq2seq("bart", encoder_layerdrop=0.9, decoder_layerdrop=0.9).train()
    results = []
    for changed in (twin(model), patch(twin(model), backend=BACKEND)):
        torch.manual_seed(3)
        results.append(run_seq2seq(changed, inputs))
    assert max(deviation(results[1], results[0]).values()) <= 1e-5
    assert "layerdrop" in warnings.text


def test_a_decoder_that_forgets_the_packing_is_an_error(monkeypatch):
    model = patch(seq2seq("bart").train(), backend=BACKEND)
    attention = model.model.decoder.layers[1].encoder_attn
    forward = attention.forward

    def dropping(hidden_states, key_value_states=None, attention_mask=None, **kwargs):
        return forward(hidden_states, key_value_states, attention_mask=attention_mask)

    monkeypatch.setattr(attention, "forward", dropping)
    with pytest.raises(UnsupportedModelError, match="3 of 4"):
        model(**sources("bart"), labels=targets())


def test_positions_that_nobody_asks_for_are_an_error(monkeypatch):
    model = patch(seq2seq("bart").train(), backend=BACKEND)
    embeddings = model.model.encoder.embed_positions
    monkeypatch.setattr(model.model.encoder, "embed_positions", torch.nn.Identity())
    monkeypatch.setattr(
        model.model.encoder.embed_positions,
        "forward",
        lambda ids: embeddings.weight[2 : 2 + ids.shape[1]][None],
    )
    with pytest.raises(UnsupportedModelError, match="positions of its packed tokens"):
        model(**sources("bart"), labels=targets())
