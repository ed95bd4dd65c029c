"""--feature-cache: the head learns what it would on the backbone itself, which runs once for each text."""

import json

import pytest
import torch
import transformers
from transformers.models.bert import modeling_bert

from fastattn.cli import main
from fastattn.finetune.errors import UserInputError
from fastattn.finetune.features import CachedHead


def finetune(*words: str) -> int:
    return main(["finetune", "--train", "head", "--batch-size", "8", *words])


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Texts that the backbone was given, call by call."""
    found, forward = [], modeling_bert.BertEmbeddings.forward

    def noting(self, input_ids=None, **kwargs):
        found.append(len(input_ids))
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(modeling_bert.BertEmbeddings, "forward", noting)
    return found


def classifier(name: str, **settings) -> torch.nn.Module:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "pad_token_id": 0, "num_labels": 3}
    sizes |= {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24} if name == "DistilBert" else {}
    sizes |= {"embedding_size": 8} if name == "Albert" else {}
    sizes |= dict.fromkeys(("cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"), 1)
    config = getattr(transformers, f"{name}Config")(**sizes, **settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def some_inputs(seed: int = 0) -> dict:
    torch.manual_seed(seed)
    mask = (torch.arange(9) < torch.tensor([9, 4, 1, 6])[:, None]).long()
    return {"input_ids": torch.randint(2, 50, (4, 9)) * mask, "attention_mask": mask}


@pytest.mark.parametrize(
    ("name", "settings", "kind"),
    [
        ("Bert", {}, "first"),
        ("Roberta", {}, "first"),
        ("DistilBert", {}, "first"),
        ("Electra", {}, "first"),
        ("Albert", {}, "first"),
        ("ModernBert", {"classifier_pooling": "cls"}, "first"),
        ("ModernBert", {"classifier_pooling": "mean"}, "mean"),
        ("Llama", {}, "last"),
    ],
)
def test_logits_and_gradients_of_the_head(name, settings, kind, tmp_path):
    model = classifier(name, **settings).eval()
    trained = [p for key, p in model.named_parameters() if not key.startswith(model.base_model_prefix)]
    model.requires_grad_(False)
    if getattr(model.base_model, "pooler", None) is not None:
        trained += model.base_model.pooler.parameters()
    for parameter in trained:
        parameter.requires_grad_(True)
    inputs = some_inputs(1)
    expected = model(**inputs).logits
    gradients = torch.autograd.grad(expected.square().sum(), trained)
    head = CachedHead(model, str(tmp_path), some_inputs())
    assert head.cache.features == kind
    for _ in range(2):
        logits = head.logits(inputs)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(logits.square().sum(), trained), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert head.cache.misses == 8


def test_a_head_that_reads_more_is_refused(tmp_path):
    model = classifier("Bert").eval().requires_grad_(False)
    forward = model.bert.forward

    def summed(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.pooler_output = out.pooler_output + out.last_hidden_state.sum(1)
        return out

    model.bert.forward = summed
    with pytest.raises(UserInputError, match="reads more than one position"):
        CachedHead(model, str(tmp_path), some_inputs())


def test_epochs_on_the_backbone_and_on_features(tmp_path, table, tiny_model, attention, calls):
    """Without dropout nothing but rounding may differ; a second run finds everything, the test texts, too."""
    still = tmp_path / "still"
    transformers.AutoModel.from_pretrained(
        tiny_model, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).save_pretrained(still)
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(still)
    common = ["--model", str(still), "--data", table, "--attention", attention, "--epochs", "3"]
    reports = []
    for name, more in (("plain", []), *((name, ["--feature-cache", str(tmp_path / "f")]) for name in "ab")):
        calls.clear()
        assert finetune(*common, *more, "--out", str(tmp_path / name)) == 0
        reports.append(json.loads((tmp_path / name / "report.json").read_text()))
        if name == "a":
            texts = reports[0]["data"]["train_texts"] + reports[0]["data"]["test_texts"]
            assert texts <= sum(calls) <= texts + 2 * 8  # the first batch, to see what the head reads
    assert sum(calls) == 8
    plain, first, second = ([step["loss"] for step in report["training"]] for report in reports)
    assert first == pytest.approx(plain, rel=1e-4)
    assert second == first
    assert reports[1]["test"]["predicted"] == reports[0]["test"]["predicted"]
    computed = [step["computed"] for step in reports[1]["training"]]
    per_epoch = len(computed) // 3
    assert any(computed[:per_epoch])
    assert not any(computed[per_epoch:])
    assert "epoch 2 took" in (tmp_path / "a" / "report.md").read_text()
    assert transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a" / "model")


def test_dropout_is_the_heads_alone(tmp_path, table, tiny_model, calls):
    words = ["--model", tiny_model, "--data", table, "--epochs", "2", "--feature-cache", str(tmp_path / "f")]
    losses = []
    for name in "ab":
        assert finetune(*words, "--seed", "0", "--out", str(tmp_path / name)) == 0
        losses.append(
            [s["loss"] for s in json.loads((tmp_path / name / "report.json").read_text())["training"]]
        )
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--train", "lora"], "--train lora"),
        (["--train", "head", "full"], "--train full"),
        (["--compare"], "--compare"),
        (["--objective", "causal-lm", "--model", "gpt2"], "causal-lm"),
        (["--feature-cache", "FILE"], "cannot be used"),
    ],
)
def test_what_it_does_not_go_with(words, said, tmp_path, table, tiny_model, capsys):
    (tmp_path / "file").write_text("")
    words = [str(tmp_path / "file") if word == "FILE" else word for word in words]
    options = ["--model", tiny_model, "--data", table, "--feature-cache", str(tmp_path / "f")]
    assert finetune(*options, "--out", str(tmp_path / "out"), *words) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not any((tmp_path / "out").glob("*"))
