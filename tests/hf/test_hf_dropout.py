"""Hidden-state dropout of patched models: the same whatever the padding, and distributed as unpatched."""

import copy
import inspect

import pytest
import torch

pytest.importorskip("transformers")
from seq2seq_zoo import run_seq2seq, seq2seq, sources, targets
from torch import nn
from zoo import (
    ENCODERS,
    ZOO,
    batch,
    build,
    decoder,
    deviation,
    labels_for,
    run,
    specimen,
    training_inputs,
    twin,
)

from fastattn import log
from fastattn.frozen.dropout import Dropout
from fastattn.hf import patch, unpatch

pytestmark = pytest.mark.usefixtures("cpu")
FUNCTION = ("opt", "bart", "marian", "whisper")
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}


def labelled(padding: str = "right", head: str = "SequenceClassification", **sizes) -> dict:
    inputs = batch(padding, **sizes)
    return {**inputs, "labels": labels_for(head, inputs)}


def seeded(model, inputs) -> dict:
    torch.manual_seed(3)
    return run(model, inputs)


def largest_difference(a: dict, b: dict) -> float:
    return max(deviation(a, b).values())


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
@pytest.mark.parametrize("family", ENCODERS)
def test_padding_free_or_not_drops_the_same(family, head):
    inputs = labelled(head=head)
    model = build(family, head, **DROPOUT).train()
    packed = seeded(patch(twin(model), padding_free=True), inputs)
    padded = seeded(patch(twin(model), padding_free=False), inputs)
    other_seed = run(patch(twin(model), padding_free=True), inputs)
    assert largest_difference(packed, padded) < 1e-5
    assert largest_difference(other_seed, padded) > 1e-2


def test_more_padding_changes_nothing():
    inputs = labelled()
    wider = {name: nn.functional.pad(x, (0, 9)) if x.dim() == 2 else x for name, x in inputs.items()}
    model = patch(build("bert", **DROPOUT).train())
    assert largest_difference(seeded(model, wider), seeded(model, inputs)) < 1e-5


def test_decoder():
    inputs = labelled()
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model = decoder("gpt2").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    packed = seeded(patch(twin(model), padding_free=True), inputs)
    padded = seeded(patch(twin(model), padding_free=False), inputs)
    assert largest_difference(packed, padded) < 1e-5


@pytest.mark.parametrize("shorter", ["source", "target", "both"])
def test_encoder_decoder(shorter):
    """Whichever side has padding, and so makes the other run packed."""
    inputs = {**sources("t5", "none" if shorter == "target" else "right"), "labels": targets()}
    if shorter == "source":
        inputs["labels"] = inputs["labels"].clamp(min=0)
    model = seq2seq("t5", dropout_rate=0.2).train()
    results = []
    for padding_free in (True, False):
        ours = patch(twin(model), padding_free=padding_free)
        torch.manual_seed(3)
        results.append(run_seq2seq(ours, inputs))
    assert largest_difference(*results) < 1e-5


@pytest.mark.parametrize("order", ["before", "after"])
def test_dropout_of_adapters(order):
    """Patched before or after peft puts it in."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["query", "value"], lora_dropout=0.3, task_type="SEQ_CLS", init_lora_weights=False
    )
    results = []
    for padding_free in (True, False):
        model = build("bert").train()
        if order == "before":
            patch(model, padding_free=padding_free)
        torch.manual_seed(0)
        model = patch(peft.get_peft_model(model, config), padding_free=padding_free)
        results.append(seeded(model, labelled()))
    assert largest_difference(*results) < 1e-5
    unpatch(model)
    assert not any(type(module) is Dropout for module in model.modules())


def test_a_decoder_drops_alike_wherever_its_padding_lies():
    """Its tokens, packed, count from the first real one."""
    model = patch(decoder("gpt2").train(), padding_free=True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.2
    right = batch("right")
    lengths = right["attention_mask"].sum(1)
    left = {
        name: torch.stack([row.roll(-int(n)) for row, n in zip(x, lengths, strict=True)])
        for name, x in right.items()
    }
    results = []
    for inputs in (right, left):
        mask = inputs["attention_mask"]
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        inputs["labels"] = inputs["input_ids"].masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)
        results.append(seeded(model, inputs))
    assert largest_difference(*results) < 1e-5


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_draws_the_same(reentrant, recompute):
    inputs = labelled()
    model = patch(build("bert", **DROPOUT).train(), recompute=recompute)
    expected = seeded(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert largest_difference(seeded(model, inputs), expected) < 1e-5


def test_same_distribution_as_unpatched():
    inputs = batch("right", size=3, length=12)
    model = build("bert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.0).train()
    changed = patch(twin(model))
    torch.manual_seed(0)
    with torch.no_grad():
        theirs, ours = (torch.stack([m(**inputs).logits for _ in range(400)]) for m in (model, changed))
    error = theirs.std(0) * (2 / 400) ** 0.5
    assert ((theirs.mean(0) - ours.mean(0)).abs() < 5 * error).all()
    ratio = ours.std(0) / theirs.std(0)
    assert ((ratio > 0.8) & (ratio < 1.25)).all(), ratio


def test_modules_are_dropouts_and_come_back():
    model = build("bert", **DROPOUT)
    names = [name for name, module in model.named_modules() if type(module) is nn.Dropout]
    patch(model)
    assert [name for name, module in model.named_modules() if type(module) is Dropout] == names
    assert all(isinstance(module, nn.Dropout) for name, module in model.named_modules() if name in names)
    copied = copy.deepcopy(model)
    unpatch(model)
    assert [name for name, module in model.named_modules() if type(module) is nn.Dropout] == names
    assert [name for name, module in copied.named_modules() if type(module) is Dropout] == names


@pytest.mark.parametrize("family", [name for name in ZOO if ZOO[name].kind != "vision"])
def test_who_calls_a_function_is_told(family, caplog, monkeypatch):
    """BART's layers and OPT's have no module that could be replaced: said once, where they drop at all."""
    monkeypatch.setattr(log, "_said", set())
    inputs = training_inputs(family, padding="right")
    for dropout in (0.0, 0.1):
        model = specimen(family, dropout=dropout) if family in FUNCTION else specimen(family)
        patch(model.train())
        for _ in range(2):
            model(**inputs)
    told = sum("stored mask" in record.message for record in caplog.records)
    assert told == (1 if family in FUNCTION else 0)
    functional = "functional.dropout(hidden_states" in inspect.getsource(inspect.getmodule(type(model)))
    assert functional == (family in FUNCTION)
