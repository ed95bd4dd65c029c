"""What is special about some encoders: shared layers, local layers, images."""

import logging

import pytest
import torch

pytest.importorskip("transformers")
from measures import rows_in_layers
from zoo import BACKEND, batch, deviation, run, specimen, training_inputs, twin

from fastattn import log
from fastattn.errors import UnsupportedError
from fastattn.hf import patch
from fastattn.hf.families import find_family

pytestmark = pytest.mark.skipif(BACKEND == "reference", reason="the native CPU library is not built")


def test_albert_counts_every_run_of_a_shared_layer(caplog):
    caplog.set_level(logging.INFO, logger="fastattn")
    model = patch(specimen("albert"), backend=BACKEND)
    assert "8 layers" in caplog.text
    assert len(find_family("albert").layer_modules(model.albert)) == 4


@pytest.mark.parametrize("groups", [1, 4])
def test_albert_with_other_groups(groups):
    changes = {"num_hidden_groups": groups, "inner_group_num": 1}
    for head in ("AlbertForSequenceClassification", "AlbertForTokenClassification"):
        inputs = training_inputs("albert", head, "right")
        model = specimen("albert", head, **changes)
        expected = run(model, inputs)
        patch(model, backend=BACKEND, padding_free=True)
        assert max(deviation(run(model, inputs), expected).values()) <= 1e-5
        assert list(rows_in_layers(model, inputs).values()) == [{int(inputs["attention_mask"].sum())}]


@pytest.mark.parametrize("padding", ["right", "left"])
def test_modernbert_that_pools_its_first_token(padding, monkeypatch, caplog):
    monkeypatch.setattr(log, "_said", set())
    head = "ModernBertForSequenceClassification"
    inputs = training_inputs("modernbert", head, padding)
    model = specimen("modernbert", head, classifier_pooling="cls")
    # On the left the first token is padding; where a window shows it no key, eager attention gives a mean.
    model.set_attn_implementation("sdpa")
    expected = run(model, inputs)
    changed = patch(twin(model), backend=BACKEND)
    assert max(deviation(run(changed, inputs), expected).values()) <= 1e-5
    packed = int(inputs["attention_mask"].sum())
    assert rows_in_layers(changed, inputs) == {"model.layers": {packed if padding == "right" else 5 * 23}}
    assert ("first position is masked" in caplog.text) == (padding == "left")


def test_a_window_counts_holes_as_distance(monkeypatch, caplog):
    monkeypatch.setattr(log, "_said", set())
    inputs = training_inputs("modernbert", padding="holes")
    model = specimen("modernbert")
    expected = run(model, inputs)
    changed = patch(twin(model), backend=BACKEND)
    assert max(deviation(run(changed, inputs), expected).values()) <= 1e-5
    assert "whose distances this model looks at" in caplog.text
    with pytest.raises(UnsupportedError, match="whose distances this model looks at"):
        patch(model, backend=BACKEND, padding_free=True)(**inputs)
    model(**training_inputs("modernbert", padding="left"))


def test_modernbert_multiple_choice_reads_the_first_real_token():
    model = specimen("modernbert", "ModernBertForMultipleChoice", classifier_pooling="cls")
    inputs = {name: value.view(3, 2, -1) for name, value in batch("left", size=6).items()}
    expected = model(**inputs).logits
    changed = patch(model, backend=BACKEND, padding_free=True)
    torch.testing.assert_close(changed(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["modernbert", "albert", "xlm-roberta"])
def test_hidden_states_are_padded_again(name):
    inputs = batch("right")
    real = inputs["attention_mask"].bool()
    model = specimen(name)
    expected = model(**inputs, output_hidden_states=True).hidden_states
    changed = patch(model, backend=BACKEND, padding_free=True)
    states = changed(**inputs, output_hidden_states=True).hidden_states
    for ours, theirs in zip(states, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=5e-5)
    assert not states[1][~real].any()


def test_images_have_no_padding_and_patch_says_so(caplog):
    caplog.set_level(logging.INFO, logger="fastattn")
    model = specimen("vit")
    inputs = training_inputs("vit")
    expected = run(model, inputs)
    # Asked to leave padding out of every batch: done, as there is none.
    patch(model, backend=BACKEND, padding_free=True)
    assert "no padding: its input has one length" in caplog.text
    assert max(deviation(run(model, inputs), expected).values()) <= 1e-5


def test_the_backend_chosen_reaches_the_attention_of_images(monkeypatch):
    from fastattn.hf import interface

    asked = []
    plain = interface.attention
    monkeypatch.setattr(
        interface,
        "attention",
        lambda *args, **options: asked.append(options["backend"]) or plain(*args, **options),
    )
    patch(specimen("vit"), backend="reference")(**training_inputs("vit"))
    assert asked == ["reference"] * 2


def test_layerdrop_keeps_its_padding(monkeypatch, caplog):
    """Layers that are skipped by chance cannot be counted."""
    monkeypatch.setattr(log, "_said", set())
    inputs = training_inputs("opt", padding="right")
    model = patch(specimen("opt", layerdrop=0.5), backend=BACKEND).train()
    model(**inputs)
    assert "layerdrop" in caplog.text
    with pytest.raises(UnsupportedError, match="layerdrop"):
        patch(specimen("opt", layerdrop=0.5), backend=BACKEND, padding_free=True).train()(**inputs)
