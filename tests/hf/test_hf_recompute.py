"""recompute: the same gradients to the bit from fewer saved bytes, whatever is trained and however."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
from measures import saved_bytes
from zoo import BACKEND, ENCODERS, ZOO, batch, build, decoder, labels_for, run, specimen, training_inputs

from fastattn.errors import InvalidArgumentError
from fastattn.hf import patch, patched, unpatch
from fastattn.hf.patch import recompute_of

QV = {"distilbert": ["q_lin", "v_lin"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}
ALL = ["query", "key", "value", "output.dense", "intermediate.dense"]


def lora(model, targets, **changes):
    options = {"r": 4, "init_lora_weights": False, "task_type": "SEQ_CLS", **changes}
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **options))


def bitfit(model, targets):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


def ia3(model, targets):
    forward = [t for t in targets if t == "intermediate.dense"]
    config = peft.IA3Config(
        target_modules=targets, feedforward_modules=forward, task_type="SEQ_CLS", init_ia3_weights=False
    )
    return peft.get_peft_model(model, config)


def two_adapters(model, targets):
    model = lora(model, targets, task_type=None)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["key"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    return model


METHODS = {
    "full": lambda model, targets: model,
    "bitfit": bitfit,
    "ia3": ia3,
    "lora": lora,
    "rslora": lambda model, targets: lora(model, targets, use_rslora=True),
    "dora": lambda model, targets: lora(model, targets, use_dora=True),
    "lora_bias": lambda model, targets: lora(model, targets, bias="all"),
    "lora_dropout": lambda model, targets: lora(model, targets, lora_dropout=0.3),
    "modules_to_save": lambda model, targets: lora(model, targets, modules_to_save=["output.LayerNorm"]),
    "two_adapters": two_adapters,
}


def labelled(padding: str = "right") -> dict:
    inputs = batch(padding)
    return {**inputs, "labels": labels_for("SequenceClassification", inputs)}


def seeded(model, inputs) -> dict:
    torch.manual_seed(5)
    return run(model, inputs)


def check(model, inputs) -> float:
    """Gradients are equal to the bit under every mode; the share of the saved bytes that "all" leaves."""
    patch(model, recompute="none", backend=BACKEND)
    expected, before = seeded(model, inputs), saved_bytes(model, inputs)
    for mode in ("auto", "all"):
        patch(unpatch(model), recompute=mode, backend=BACKEND)
        for _ in range(2):  # "auto" chooses in its first step
            result = seeded(model, inputs)
            assert result.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(result[name], value), (mode, name)
    return saved_bytes(model, inputs) / before


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_every_method(method):
    torch.manual_seed(0)
    model = METHODS[method](build("bert").train(), ["query", "value"])
    # IA3 needs what its frozen layers return, DoRA and dropout within an adapter what they make of x.
    assert check(model, labelled()) < (0.7 if method in ("ia3", "dora", "lora_dropout") else 0.55)


@pytest.mark.parametrize("targets", [["key"], ["output.dense"], ["intermediate.dense"], ALL], ids=str)
def test_adapters_on_any_subset(targets):
    torch.manual_seed(0)
    model = lora(build("bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train(), targets)
    assert check(model, labelled()) < 0.75


def test_weights_frozen_and_set_free_after_the_first_step():
    """The plan is that of a model which has been so from the beginning."""
    inputs = labelled()

    def train(model, layers):
        model.requires_grad_(False).classifier.requires_grad_(True)
        for layer in model.bert.encoder.layer[3 - layers :]:
            layer.requires_grad_(True)

    model = patch(build("bert").train(), backend=BACKEND)
    for layers in (1, 3, 2):
        train(model, layers)
        train(fresh := patch(build("bert").train(), backend=BACKEND), layers)
        run(fresh, inputs)
        run(model, inputs)
        found, expected = ([site.chosen for site in recompute_of(m.bert).sites] for m in (model, fresh))
        assert found == expected
        assert layers == 1 or not all(found)
        assert saved_bytes(model, inputs) == saved_bytes(fresh, inputs)


@pytest.mark.parametrize("family", ENCODERS)
def test_families(family):
    torch.manual_seed(0)
    model = lora(build(family).train(), QV.get(family, ["query", "value"]))
    assert check(model, labelled()) < 0.45


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decoders(family):
    torch.manual_seed(0)
    model = lora(decoder(family).train(), QV[family], task_type="CAUSAL_LM")
    inputs = batch("right")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    assert check(model, inputs) < 0.75


@pytest.mark.parametrize("name", ["albert", "modernbert", "gemma2", "phi3", "t5", "bart"])
def test_other_families(name):
    torch.manual_seed(0)
    model = lora(specimen(name).train(), list(ZOO[name].lora), task_type=None)
    assert check(model, training_inputs(name, padding="right")) < 0.7


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    torch.manual_seed(0)
    model = lora(build("bert", hidden_dropout_prob=0.2).train(), ["query", "value"])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    check(model, labelled())


@pytest.mark.parametrize("method", ["lora", "lora_dropout"])
def test_autocast_and_bfloat16(method):
    torch.manual_seed(0)
    model = METHODS[method](build("bert").train(), ["query", "value"])
    with torch.autocast("cpu", torch.bfloat16):
        check(model, labelled())
    check(unpatch(model).to(torch.bfloat16), labelled())


def test_adapters_put_in_later_and_merged_later():
    torch.manual_seed(0)
    model = patch(build("bert").train(), recompute="all", backend=BACKEND)
    run(model, labelled())
    model = lora(model, ["query", "value"])
    unpatched = unpatch(copy.deepcopy(model))
    expected = run(patch(unpatched, recompute="none", backend=BACKEND), labelled())
    result = run(model, labelled())
    assert all(torch.equal(result[name], value) for name, value in expected.items())
    assert saved_bytes(model, labelled()) < 0.5 * saved_bytes(unpatched, labelled())
    with model.disable_adapter():
        off = model(**labelled())
    plain = model.merge_and_unload().requires_grad_(True)
    assert not torch.equal(off.logits, expected["logits"])
    check(unpatch(plain), labelled())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unpatch(plain).modules())


def test_copies_are_on_their_own():
    torch.manual_seed(0)
    model = patch(lora(build("bert").train(), ["query", "value"]), recompute="all", backend=BACKEND)
    twin = copy.deepcopy(model)
    expected = run(model, labelled())
    unpatch(model)
    bytes_unpatched = saved_bytes(model, labelled())
    result = run(twin, labelled())
    assert all(torch.equal(result[name], value) for name, value in expected.items())
    assert saved_bytes(twin, labelled()) < 0.3 * bytes_unpatched
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nothing_is_saved_below_the_lowest_trained_parameter():
    """Autograd cuts there by itself: embeddings and frozen layers below cost no memory."""
    model = build("bert", num_hidden_layers=4).train().requires_grad_(False)
    top = model.bert.encoder.layer[3]
    top.attention.self.query.weight.requires_grad_(True)
    inputs = labelled()
    with patched(model, recompute="all", backend=BACKEND):
        of_four = saved_bytes(model, inputs)
        model.bert.encoder.layer = model.bert.encoder.layer[2:]
        assert saved_bytes(model, inputs) == of_four
    seen = []
    with patched(model, recompute="none", backend=BACKEND):
        hook = torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t), lambda t: t)
        frozen = model.bert.encoder.layer[0]
        frozen.register_forward_pre_hook(lambda m, a: seen.clear())
        frozen.register_forward_hook(lambda m, a, out: seen.append(f"{len(seen)} saved"))
        with hook:
            model(**inputs)
    assert seen[0] == "0 saved"


def test_a_wrong_mode_is_refused():
    with pytest.raises(InvalidArgumentError, match="'auto', 'all' or 'none'"):
        patch(build("bert"), recompute="some")
