"""Layers that patch lets work in another way: same model, hooks seen, and back again.

What they compute is tested in tests/frozen; which of them a model gets, and what it makes of them, here.
"""

import copy
import io

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
import transformers
from torch import nn
from zoo import BACKEND, batch, build, deviation, labels_for, run, specimen, training_inputs, twin

from fastattn.frozen import Linear, linear, lora, product
from fastattn.hf import patch, unpatch
from fastattn.hf.intermediate import XLMRobertaIntermediate

BF16 = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._is_mkldnn_bf16_supported()
needs_bf16 = pytest.mark.skipif(not BF16, reason="oneDNN has no bf16 here")


@pytest.fixture
def products(monkeypatch):
    """Small products are fused on every machine; the list grows by the epilogue of each."""
    calls, way = [], Linear.product

    def counted(self, x, gelu=False):
        calls.append("gelu" if gelu else "")
        return way(self, x, gelu)

    monkeypatch.setattr(linear, "bf16_gains", lambda: True)
    monkeypatch.setattr(linear, "FEWEST_ROWS", 1)
    monkeypatch.setattr(product, "FEWEST_ROWS", 1)
    monkeypatch.setattr(product, "serves", lambda: True)
    monkeypatch.setattr(product, "beats_torch", lambda: False)
    monkeypatch.setattr(Linear, "product", counted)
    return calls


def labelled(seed: int = 0) -> dict:
    inputs = batch("right", seed=seed)
    return {**inputs, "labels": labels_for("SequenceClassification", inputs, seed + 1)}


def head_only(family: str = "bert", dtype=torch.bfloat16, **changes) -> nn.Module:
    model = build(family, **changes).to(dtype)
    model.base_model.requires_grad_(False)
    return model


def distances(model: nn.Module, exact: nn.Module) -> dict[str, float]:
    """From the same weights in float64: logits, loss and gradients, root sums of squares over batches, as the
    largest difference of a single one is too much a matter of luck."""
    found = {}
    for seed in range(8):
        inputs = labelled(seed)
        result, expected = run(model, inputs), run(exact, inputs)
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            kind = name.split()[0]
            found[kind] = found.get(kind, 0.0) + float((result[name].double() - value).square().sum())
    return {kind: square**0.5 for kind, square in found.items()}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *(
            pytest.param(x, torch.bfloat16, marks=needs_bf16)
            for x in ("bert", "roberta", "electra", "distilbert")
        ),
        ("bert", torch.float32),
    ],
)
def test_head_only(family, dtype, products):
    """In fp32 GELU alone moves into the product."""
    model = head_only(family, dtype)
    exact = twin(model).double()
    theirs = distances(model, exact)
    ours = distances(patch(model, backend=BACKEND), exact)
    assert products.count("gelu") == (0 if family == "distilbert" else 8 * 3)
    assert (products.count("") >= 8 * 3) == (dtype == torch.bfloat16)
    assert all(ours[kind] <= 2 * theirs[kind] for kind in theirs), (ours, theirs)


def test_xlm_roberta(products):
    config = transformers.XLMRobertaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    model = patch(transformers.XLMRobertaModel(config), backend=BACKEND)
    assert type(model.encoder.layer[0].intermediate) is XLMRobertaIntermediate


@needs_bf16
def test_only_where_nothing_trains(products):
    """With the middle layer's attention trained, GELU is fused below it alone."""
    model = patch(head_only(), backend=BACKEND, recompute="all")
    model.bert.encoder.layer[1].attention.requires_grad_()
    run(model, labelled())
    assert products.count("gelu") == 1
    products.clear()
    with torch.no_grad():
        model(**batch())
    assert products.count("gelu") == 3


@needs_bf16
@pytest.mark.parametrize("where", ["dense", "intermediate_act_fn"])
def test_hooks_see_what_they_saw(where, products):
    seen = []
    model = head_only()
    module = getattr(model.bert.encoder.layer[1].intermediate, where)
    module.register_forward_hook(lambda module, args, out: seen.append(out.float()))
    with torch.no_grad():
        model(**batch("none"))
        patch(model, backend=BACKEND)(**batch("none"))
    assert products.count("gelu") == 2
    torch.testing.assert_close(seen[1].view(seen[0].shape), seen[0], rtol=0.05, atol=0.05)


@needs_bf16
def test_other_activations_stay_passes(products):
    with torch.no_grad():
        patch(head_only(hidden_act="gelu_new"), backend=BACKEND)(**batch())
        model = patch(head_only(), backend=BACKEND)
        model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()  # since patch
        model(**batch())
    assert products.count("gelu") == 2


@needs_bf16
def test_copies_files_and_back(products, tmp_path):
    inputs = labelled()
    model = head_only()
    classes = [type(module) for module in model.modules()]
    before, state = run(model, inputs), copy.deepcopy(model.state_dict())
    patch(model, backend=BACKEND)
    patched = run(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert max(deviation(run(other, inputs), patched).values()) == 0
        assert [type(module) for module in unpatch(other).modules()] == classes
    model.save_pretrained(tmp_path)
    assert transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in unpatch(model).modules()] == classes
    assert max(deviation(run(model, inputs), before).values()) == 0


def adapted(change=lambda model: model, **settings) -> nn.Module:
    """`change` is done before the adapters come."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False, **settings
    )
    return peft.get_peft_model(change(build("bert")), config)


def adapters(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules() if isinstance(module, peft.tuners.lora.Linear)}


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_lora(order, recompute, monkeypatch):
    calls, apply = [], lora._Product.apply
    monkeypatch.setattr(lora._Product, "apply", lambda *args: calls.append(args) or apply(*args))
    inputs = labelled()
    expected = run(adapted(), inputs)
    options = {"backend": BACKEND, "recompute": recompute}
    if order == "before":
        model = adapted(lambda model: patch(model, **options))
    else:
        model = patch(adapted(), **options)
    result = run(model, inputs)
    assert len(calls) > 6 if recompute == "all" else len(calls) == 6
    assert max(deviation(result, expected).values()) <= 1e-5
    unpatch(model)
    assert adapters(model) == {peft.tuners.lora.Linear}


def test_lora_recompute_to_the_bit():
    """In bf16 with dropout, too, where another way would show."""
    results = []
    for recompute in ("none", "all"):
        model = patch(adapted(lora_dropout=0.2).to(torch.bfloat16), backend=BACKEND, recompute=recompute)
        model.train()
        torch.manual_seed(0)
        results.append(run(model, labelled()))
    assert max(deviation(results[1], results[0]).values()) == 0


@needs_bf16
def test_recompute_takes_the_way_that_forward_took(products):
    """It runs layers without gradients that ran with them, which is not what `Linear` goes by."""
    model = patch(adapted().to(torch.bfloat16), backend=BACKEND, recompute="all")
    loss = model(**labelled()).loss
    before = len(products)
    loss.backward()
    assert len(products) == before > 0


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_in_the_head(order):
    """Outside of the bare model, whose hooks do not see it."""
    torch.manual_seed(0)
    model = specimen("llama")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    inputs = training_inputs("llama", padding="right")
    expected = run(peft.get_peft_model(twin(model), config), inputs)
    model = patch(model, backend=BACKEND) if order == "before" else model
    model = patch(peft.get_peft_model(model, config), backend=BACKEND)
    found = run(model, inputs)
    assert type(model.base_model.model.lm_head) is lora.Linear
    assert found.keys() == expected.keys()
    assert type(unpatch(model).base_model.model.lm_head) is peft.tuners.lora.Linear
