"""explain(model): what it predicts and measures is what autograd saves."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
from zoo import BACKEND, batch, build, decoder, labels_for

from fastattn.errors import InvalidArgumentError, UnsupportedModelError
from fastattn.finetune.measure import SavedBytes
from fastattn.hf import explain, patch, unpatch


def adapted(model, targets=("query", "value"), task="SEQ_CLS"):
    torch.manual_seed(0)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=list(targets), task_type=task)
    ).train()


def saved(model, inputs) -> int:
    counter = SavedBytes((*model.parameters(), *model.buffers()))
    with counter.counting():
        model(**inputs)
    return counter.bytes


def wide(padding: str = "right") -> dict:
    inputs = batch(padding, size=6, length=60)
    return {**inputs, "labels": labels_for("SequenceClassification", inputs)}


@pytest.mark.parametrize("mode", ["none", "auto", "all"])
@pytest.mark.parametrize("padding", ["none", "right"])
def test_predicted_measured_and_counted_agree(padding, mode):
    model = patch(adapted(build("bert")), recompute=mode, backend=BACKEND)
    inputs = wide(padding)
    explained = explain(model, inputs)
    assert explained.saved_bytes == saved(model, inputs)
    assert explained.predicted_bytes == pytest.approx(explained.saved_bytes, rel=0.05)
    assert len(explained.layers) == 4
    assert sum(layer.saved_bytes for layer in explained.layers) == explained.saved_bytes
    for layer in explained.layers[1:2]:
        assert layer.predicted_bytes == pytest.approx(layer.saved_bytes, rel=0.05)
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


def test_unpatched_models_and_decoders():
    model = adapted(decoder("gpt2"), ["c_attn"], "CAUSAL_LM")
    inputs = batch("right", size=4, length=40)
    inputs["labels"] = inputs["input_ids"]
    unpatched = explain(model, inputs)
    assert unpatched.saved_bytes == saved(model, inputs)
    assert unpatched.recompute_flops == 0
    ours = explain(patch(model, backend=BACKEND), inputs)
    assert ours.saved_bytes < unpatched.saved_bytes


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
    with pytest.raises(InvalidArgumentError, match="input_ids"):
        explain(build("bert"), {"inputs_embeds": torch.zeros(1, 2, 32)})
    with pytest.raises(UnsupportedModelError, match="no list of layers"):
        explain(torch.nn.Linear(2, 2), wide())
