"""explain(model): what it predicts and measures is what autograd saves."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
from measures import saved_bytes
from seq2seq_zoo import targets
from zoo import BACKEND, ZOO, batch, build, labels_for, specimen, training_inputs

from fastattn.errors import InvalidArgumentError, UnsupportedModelError
from fastattn.hf import explain, patch, unpatch


def adapted(model, targets=("query", "value"), task="SEQ_CLS"):
    torch.manual_seed(0)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=list(targets), task_type=task)
    ).train()


def wide(padding: str = "right") -> dict:
    inputs = batch(padding, size=6, length=60)
    return {**inputs, "labels": labels_for("SequenceClassification", inputs)}


@pytest.mark.parametrize("mode", ["none", "auto", "all"])
@pytest.mark.parametrize("padding", ["none", "right"])
def test_predicted_measured_and_counted_agree(padding, mode):
    model = patch(adapted(build("bert")), recompute=mode, backend=BACKEND)
    inputs = wide(padding)
    explained = explain(model, inputs)
    assert explained.saved_bytes == saved_bytes(model, inputs)
    assert explained.predicted_bytes == pytest.approx(explained.saved_bytes, rel=0.02)
    assert len(explained.layers) == 4
    assert sum(layer.saved_bytes for layer in explained.layers) == explained.saved_bytes
    for layer in explained.layers[:3]:
        assert layer.predicted_bytes == pytest.approx(layer.saved_bytes, rel=0.02)
        assert layer.predicted_flops == pytest.approx(layer.recompute_flops, rel=1e-6)
    assert (explained.recompute_flops > 0) == (mode != "none")


def test_what_is_not_saved_makes_up_the_difference():
    inputs = wide()
    model = patch(adapted(build("bert")), recompute="none", backend=BACKEND)
    nothing = explain(model, inputs)
    everything = explain(patch(unpatch(model), recompute="all", backend=BACKEND), inputs)
    middle, before = everything.layers[1], nothing.layers[1]
    assert {name for name, _, _ in middle.recomputed} >= {
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.LayerNorm",
        "intermediate.dense",
    }
    spared = sum(size for name, size, _ in middle.recomputed if name != "attention.output.LayerNorm")
    assert middle.saved_bytes + spared == pytest.approx(before.saved_bytes, rel=0.15)
    tokens = int(inputs["attention_mask"].sum())
    flops = {name: flops for name, _, flops in middle.recomputed}
    assert flops["attention.self.key"] == 2 * tokens * 32 * 32
    assert flops["attention.self.query"] == 2 * tokens * (32 * 32 + 2 * 4 * 32)
    assert flops["attention.output.LayerNorm"] == 0
    text = str(everything)
    assert "bert.encoder.layer.1" in text
    assert "again attention.self.query" in text


def inputs_of(name: str) -> dict:
    """Longer than any short batch, source and target of different lengths."""
    if ZOO[name].kind == "vision":
        return training_inputs(name)
    inputs = training_inputs(name, padding="right", size=6, length=60)
    if ZOO[name].kind in ("encoder-decoder", "speech"):
        inputs["labels"] = targets(6, 55)
    return inputs


def lora(name: str, dtype: torch.dtype) -> torch.nn.Module:
    targets = list(ZOO[name].lora)
    return adapted(specimen(name).to(dtype), targets, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["unpatched", "none", "auto"])
@pytest.mark.parametrize("name", ["albert", "vit", "gpt2", "llama", "t5", "bart", "whisper"])
def test_every_kind_of_model(name, mode, dtype):
    model, inputs = lora(name, dtype), inputs_of(name)
    if name in ("vit", "whisper"):
        inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    if mode != "unpatched":
        patch(model, recompute=mode, backend=BACKEND)
    explained = explain(model, inputs)
    assert explained.saved_bytes == saved_bytes(model, inputs)
    assert explained.predicted_bytes == pytest.approx(explained.saved_bytes, rel=0.02)
    assert explained.predicted_flops == pytest.approx(explained.recompute_flops, rel=1e-6)
    assert (explained.recompute_flops > 0) == (mode == "auto")
    for layer in explained.layers[:-1]:
        assert layer.saved_bytes > 0
        assert layer.predicted_bytes == pytest.approx(layer.saved_bytes, rel=0.02)
    stacks = {layer.name.rpartition(".")[0] for layer in explained.layers[:-1]}
    assert len(stacks) == (2 if name in ("t5", "bart", "whisper") else 1)


@pytest.mark.parametrize("mode", ["unpatched", "auto"])
@pytest.mark.parametrize("head", ["T5", "Bart", "Llama"])
def test_heads_that_read_where_a_sample_ends(head, mode, caplog, monkeypatch):
    """An end token, or the last that is no padding: short batches have them, too."""
    monkeypatch.setattr("fastattn.log._said", set())
    name, head = head.lower(), f"{head}ForSequenceClassification"
    model = adapted(specimen(name, head), list(ZOO[name].lora), None)
    inputs = training_inputs(name, head, padding="right", size=6, length=60)
    if mode != "unpatched":
        patch(model, recompute=mode, backend=BACKEND)
    explained = explain(model, inputs)
    assert explained.saved_bytes == saved_bytes(model, inputs)
    for layer in explained.layers[:-1]:
        assert layer.predicted_bytes == pytest.approx(layer.saved_bytes, rel=0.02)
    assert explained.predicted_flops == pytest.approx(explained.recompute_flops, rel=1e-6)
    assert not caplog.records  # such as that padding stays


def test_what_is_computed_again_outside_of_the_layers_counts():
    model = patch(specimen("bert", "BertForMaskedLM").train(), recompute="all", backend=BACKEND)
    explained = explain(model, training_inputs("bert", "BertForMaskedLM"))
    names = [name for name, _, _ in explained.layers[-1].recomputed]
    assert any("embeddings.LayerNorm" in name for name in names)


def test_layers_that_share_weights_count_every_time():
    found = []
    for times in (1, 2):
        model = specimen("albert", num_hidden_layers=2 * times, num_hidden_groups=1)
        explained = explain(patch(adapted(model, ["query"], None), recompute="all"), inputs_of("albert"))
        found.append(explained.recompute_flops)
    assert found[1] == pytest.approx(2 * found[0], rel=0.2)


def test_it_leaves_no_trace():
    model = patch(adapted(build("bert", hidden_dropout_prob=0.1)), backend=BACKEND)
    inputs = wide()
    torch.manual_seed(0)
    expected = model(**inputs).loss
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    torch.manual_seed(0)
    explain(model, inputs)
    assert torch.equal(model(**inputs).loss, expected)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_refusals():
    with pytest.raises(InvalidArgumentError, match="without a tensor"):
        explain(build("bert"), {"input_ids": None})
    with pytest.raises(UnsupportedModelError, match="no list of layers"):
        explain(torch.nn.Linear(2, 2), wide())
