"""torch.compile of patched models: the unpatched gradients, no graph break but where padding is counted."""

import pytest
import torch

pytest.importorskip("transformers")
from zoo import BACKEND, ZOO, deviation, specimen, training_inputs, twin

from fastattn.hf import patch

pytestmark = pytest.mark.skipif(BACKEND == "reference", reason="the reference is no op to be compiled")
SMALL = {
    "bert": {"num_hidden_layers": 1},
    "llama": {"num_hidden_layers": 1},
    "t5": {"num_layers": 1, "num_decoder_layers": 1},
}


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def model_and_inputs(name: str, adapted: bool) -> tuple[torch.nn.Module, dict]:
    model = specimen(name, **SMALL[name]).train()
    if adapted:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=list(ZOO[name].lora), init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    return model, training_inputs(name, padding="right")


def step(model, inputs: dict, compiled) -> dict:
    """Of `compiled`, which has the parameters of `model`: what zoo.run gives."""
    out = compiled(**inputs)
    out.loss.backward()
    found = {"logits": out.logits.detach()[inputs["labels"] != -100], "loss": out.loss.detach()}
    found.update({f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None})
    return found


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "adapted"), [("bert", True), ("llama", True), ("t5", False)])
def test_training_in_one_graph(name, adapted, backend):
    """padding_free=False: nothing about the batch is data, so nothing breaks the graph."""
    model, inputs = model_and_inputs(name, adapted)
    expected = step(model, inputs, model)
    model = patch(twin(model), padding_free=False, backend=BACKEND)
    found = step(model, inputs, torch.compile(model, backend=backend, fullgraph=True))
    assert max(deviation(found, expected).values()) <= 1e-5


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "t5"))]
)
def test_packed_training_breaks_where_padding_is_counted(name):
    model, inputs = model_and_inputs(name, True)
    expected = step(model, inputs, model)
    model = patch(twin(model), padding_free=True, backend=BACKEND)
    found = step(model, inputs, torch.compile(model, backend="aot_eager"))
    assert max(deviation(found, expected).values()) <= 1e-5
    reasons = torch._dynamo.utils.counters["graph_break"]
    assert reasons
    assert all("<function plan at" in reason for reason in reasons), reasons
