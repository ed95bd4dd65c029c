"""patch and unpatch: what they take, what they refuse, and what else people do with a patched model."""

import copy
import io
import logging

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
import transformers
from zoo import BACKEND, ENCODERS, batch, build, deviation, labels_for, run, twin

import fastattn
from fastattn.errors import (
    BackendUnavailableError,
    InvalidArgumentError,
    UnsupportedModelError,
)
from fastattn.hf import patch, patched, unpatch


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def labelled(padding: str = "right") -> dict:
    inputs = batch(padding)
    return {**inputs, "labels": labels_for("SequenceClassification", inputs)}


def test_public_names():
    assert fastattn.patch is patch
    assert fastattn.unpatch is unpatch
    assert fastattn.patched is patched


def test_patch_says_what_it_did(caplog):
    caplog.set_level(logging.INFO, logger="fastattn")
    model = build("bert")
    assert patch(model, backend=BACKEND) is model
    assert "BertModel" in caplog.text
    assert "3 layers" in caplog.text
    assert f"backend {BACKEND}" in caplog.text
    assert "reads the first position" in caplog.text


def test_patching_twice():
    model = patch(build("bert"), backend=BACKEND)
    count = hooks(model)
    patch(model, backend=BACKEND)
    assert hooks(model) == count
    with pytest.raises(InvalidArgumentError, match="unpatch"):
        patch(model, backend=BACKEND, padding_free=False)
    unpatch(unpatch(model))
    assert hooks(model) == 0
    patch(model, backend=BACKEND, padding_free=False)


def test_what_is_no_transformers_model():
    with pytest.raises(InvalidArgumentError, match=r"torch\.nn\.Module"):
        patch("bert-base-uncased")
    with pytest.raises(UnsupportedModelError, match="no transformers model"):
        patch(nn.Linear(2, 2))


def test_a_family_nobody_knows_is_refused_and_left_alone():
    config = transformers.FunnelConfig(
        vocab_size=50, block_sizes=[1], d_model=16, n_head=2, d_head=8, d_inner=16
    )
    holder = nn.ModuleDict({"known": build("bert"), "unknown": transformers.FunnelModel(config)})
    with pytest.raises(UnsupportedModelError, match=r"FunnelModel, 'funnel'.*would patch.*BertModel.*bert"):
        patch(holder)
    assert hooks(holder) == 0
    assert holder["known"].config._attn_implementation == "eager"


@pytest.mark.parametrize("change", ["renamed encoder", "renamed attention", "no keywords", "no layers"])
def test_a_transformers_that_was_rebuilt_is_refused(change):
    model = build("bert")
    encoder = model.bert.encoder
    if change == "renamed encoder":
        model.bert.transformer = encoder
        del model.bert.encoder
    elif change == "renamed attention":
        layer = encoder.layer[2]
        layer.mixer = layer.attention
        del layer.attention
    elif change == "no layers":
        encoder.layer = nn.ModuleList()
    else:

        class Layer(nn.Module):
            def forward(self, hidden_states, attention_mask):
                return hidden_states

        encoder.layer[1] = Layer()
    with pytest.raises(UnsupportedModelError, match=f"'bert'.*transformers {transformers.__version__}"):
        patch(model)
    assert hooks(model) == 0


def test_a_backend_that_is_not_here():
    model = build("bert")
    with pytest.raises(InvalidArgumentError, match="backend"):
        patch(model, backend="flash")
    if torch.cuda.is_available():
        pytest.skip("the CUDA backend may be here")
    with pytest.raises(BackendUnavailableError, match="cuda"):
        patch(model, backend="cuda")
    assert hooks(model) == 0


def test_the_backend_asked_for_is_used(monkeypatch):
    from fastattn.hf import interface

    asked = set()

    def spy(function):
        def call(*args, **options):
            asked.add(options["backend"])
            return function(*args, **options)

        return call

    for name in ("attention", "varlen_attention"):
        monkeypatch.setattr(interface, name, spy(getattr(interface, name)))
    model = patch(build("bert"), backend="reference")
    model(**batch("right"))
    model(**batch("left"))
    assert asked == {"reference"}


def test_two_models_in_one_module():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = build("bert", "Model"), build("roberta", "Model", seed=1)

        def forward(self, **inputs):
            return self.left(**inputs).pooler_output + self.right(**inputs).pooler_output

    pair = Pair()
    inputs = batch("right")
    expected = pair(**inputs)
    patch(pair, backend=BACKEND)
    torch.testing.assert_close(pair(**inputs), expected, rtol=1e-5, atol=1e-5)
    unpatch(pair)
    assert hooks(pair) == 0
    assert torch.equal(pair(**inputs), expected)


def test_a_users_own_head():
    """Its forward need not take keywords: the bare model below is patched all the same."""

    class Mean(transformers.BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = transformers.BertModel(config, add_pooling_layer=False)
            self.post_init()

        def forward(self, input_ids, attention_mask):
            hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
            weights = attention_mask.unsqueeze(-1) / attention_mask.sum(1)[:, None, None]
            return (hidden * weights).sum(1)

    model = Mean(build("bert").config).eval()
    for padding in ("right", "left"):
        inputs = batch(padding)
        expected = unpatch(model)(**inputs)
        torch.testing.assert_close(patch(model, backend=BACKEND)(**inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("copier", ["deepcopy", "torch.save"])
def test_copies_of_a_patched_model(copier):
    model = build("bert")
    inputs = batch("right")
    expected = model(**inputs).logits
    patch(model, backend=BACKEND)
    if copier == "deepcopy":
        duplicate = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        duplicate = torch.load(file, weights_only=False)
    torch.testing.assert_close(duplicate(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    unpatch(duplicate)
    assert hooks(duplicate) == 0
    assert duplicate.config._attn_implementation == "eager"
    assert torch.equal(duplicate(**inputs).logits, expected)
    assert hooks(model) > 0
    assert model.config._attn_implementation == "fastattn"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ENCODERS)
def test_gradient_checkpointing(family, reentrant):
    inputs = labelled()
    model = build(family).train()
    expected = run(model, inputs)
    patch(model, backend=BACKEND)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert max(deviation(run(model, inputs), expected).values()) <= 1e-5


@pytest.mark.parametrize("padding", ["right", "left"])
def test_attention_weights_are_the_models_own(padding):
    inputs = batch(padding)
    for family in ENCODERS:
        model = build(family)
        expected = model(**inputs, output_attentions=True)
        patch(model, backend=BACKEND)
        out = model(**inputs, output_attentions=True)
        torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-5)
        assert len(out.attentions) == len(expected.attentions) == 3
        for ours, theirs in zip(out.attentions, expected.attentions, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_attention_weights_asked_for_in_the_config():
    model = build("bert")
    model.config.output_attentions = True
    expected = model(**batch("right"))
    out = patch(model, backend=BACKEND)(**batch("right"))
    assert len(out.attentions) == 3
    torch.testing.assert_close(out.attentions[1], expected.attentions[1], rtol=1e-5, atol=1e-6)


def test_autocast():
    """No further from fp32 than unpatched, logits and gradients, in root mean square."""
    inputs = labelled()
    model = build("bert")
    exact = run(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = run(model, inputs)
        ours = run(patch(model, backend=BACKEND), inputs)
    assert ours.keys() == theirs.keys() == exact.keys()
    gradients = [name for name in exact if name.startswith("grad")]
    for names in (["logits"], gradients):
        errors = [
            sum((result[name].float() - exact[name]).square().sum() for name in names) ** 0.5
            for result in (ours, theirs)
        ]
        assert errors[0] <= 2 * errors[1]


def test_bert_as_a_decoder():
    """Causal, with a cache: attention is ours, padding stays."""
    model = build("bert", "Model", is_decoder=True)
    inputs = batch("right")
    real = inputs["attention_mask"].bool()
    expected = model(**inputs).last_hidden_state
    out = patch(model, backend=BACKEND)(**inputs).last_hidden_state
    torch.testing.assert_close(out[real], expected[real], rtol=1e-5, atol=2e-5)


def test_trainer(tmp_path):
    """A few steps of Trainer: the same losses patched and unpatched."""
    rows = [
        {name: value[0] for name, value in batch("none", size=1, length=4 + i % 9, seed=i).items()}
        for i in range(16)
    ]
    for i, row in enumerate(rows):
        row["labels"] = i % 3

    def collate(samples):
        width = max(len(sample["input_ids"]) for sample in samples)
        pad = nn.functional.pad
        columns = {
            name: torch.stack([pad(sample[name], (0, width - len(sample[name]))) for sample in samples])
            for name in ("input_ids", "attention_mask")
        }
        return {**columns, "labels": torch.tensor([sample["labels"] for sample in samples])}

    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, max_steps=4, per_device_train_batch_size=4, logging_steps=1, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, learning_rate=1e-2, dataloader_pin_memory=False,
    )  # fmt: skip
    losses = []
    for change in (twin, lambda model: patch(twin(model), backend=BACKEND)):
        trainer = transformers.Trainer(
            change(build("bert")), arguments, train_dataset=rows, data_collator=collate
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != pytest.approx(losses[0][-1], rel=1e-3)
