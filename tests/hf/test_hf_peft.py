"""Adapters: patched before or after they are put in, they get the same gradients and really learn."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
from zoo import BACKEND, ENCODERS, batch, build, deviation, labels_for, run

from fastattn.hf import patch, unpatch

TARGETS = {"distilbert": ["q_lin", "v_lin", "lin1", "out_lin"]}
ALL = ["query", "key", "value", "output.dense", "intermediate.dense"]


def adapted(family: str, method: str = "lora", targets=None):
    model = build(family)
    targets = targets or TARGETS.get(family, ["query", "value"])
    if method == "lora":
        config = peft.LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS", init_lora_weights=False)
    elif method == "ia3":
        feedforward = [name for name in targets if name in ("lin1", "intermediate.dense")]
        config = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward, task_type="SEQ_CLS")
    elif method == "prompt":
        config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")
    else:
        config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")
    return model, config


def labelled(padding: str) -> dict:
    inputs = batch(padding)
    return {**inputs, "labels": labels_for("SequenceClassification", inputs)}


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", ENCODERS)
def test_lora_gradients(family, order, padding):
    inputs = labelled(padding)
    torch.manual_seed(0)
    model, config = adapted(family)
    expected = run(peft.get_peft_model(model, config), inputs)
    torch.manual_seed(0)
    model, config = adapted(family)
    if order == "before":
        model = peft.get_peft_model(patch(model, backend=BACKEND), config)
    else:
        model = patch(peft.get_peft_model(model, config), backend=BACKEND)
    result = run(model, inputs)
    assert any("lora_A" in name for name in result)
    assert max(deviation(result, expected).values()) <= 1e-5
    unpatch(model)
    assert model.config._attn_implementation == "eager"
    assert max(deviation(run(model, inputs), expected).values()) == 0


def test_adapters_learn():
    """Every trained parameter moves, no frozen one does, and the loss goes where the unpatched one goes."""
    inputs = labelled("right")
    losses = []
    for change in (lambda model: model, lambda model: patch(model, backend=BACKEND)):
        torch.manual_seed(0)
        model, config = adapted("bert", targets=ALL)
        model = change(peft.get_peft_model(model, config))
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(5):
            loss = model(**inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < 0.9 * losses[0][0]
