"""--objective seq2seq and causal-lm: losses as transformers has them, every method, whole runs."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from fastattn.cli import main
from fastattn.finetune import datasets, encoding, evaluation
from fastattn.finetune.command import DEFAULTS
from fastattn.finetune.errors import UserInputError
from fastattn.finetune.settings import Settings, default_lr
from fastattn.finetune.training import Trainer

TEXT = 24  # tokens
OBJECTIVES = ["seq2seq", "causal-lm"]
COMPARED = ["--compare", "--compare-steps", "2"]
METHODS = ["lora", "prefix", "prompt", "ln", "last-1", "full"]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory, rows) -> str:
    """Texts, and as targets their first word three times."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.csv"
    path.write_text("text,target\n" + "".join(f"{text},{(label + ' ') * 3}\n" for text, label in rows))
    return str(path)


@pytest.fixture
def make_trainer(tmp_path, pairs, language_model, seq2seq_model):
    from transformers import AutoTokenizer

    def make(objective, attention="sdpa", **changes) -> Trainer:
        model = seq2seq_model if objective == "seq2seq" else language_model
        values = {"model": model, "data": pairs, "train": "full", "lr": 1e-3, "batch_size": 8, "steps": 20}
        settings = Settings(**{**DEFAULTS, **values, "backbone_dtype": "float32", "objective": objective})
        dataset = datasets.load_language_file(pairs, "text", "target" if objective == "seq2seq" else None)
        path = tmp_path / f"{objective}.npz"
        ended = objective == "causal-lm"
        encoding.encode_dataset(dataset, AutoTokenizer.from_pretrained(model), TEXT, path, ended)
        trainer = Trainer(dataclasses.replace(settings, **changes).to_json(), [], attention, str(path))
        trainer.prepare(dropout=False)
        return trainer

    return make


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_models_own(make_trainer, objective):
    """Row by row without padding, by transformers' own shifting of labels."""
    trainer = make_trainer(objective)
    trainer.evaluation_batches(None)
    batches = range(len(trainer.evaluation))
    found = {row.pop("row"): row for batch in batches for row in trainer.evaluate(batch)}
    assert len(found) == len(trainer.test) == 12
    for i, row in found.items():
        ids = torch.from_numpy(trainer.test.tokens(i).astype(np.int64))[None]
        asked = trainer.test.targets([i])[0] if objective == "seq2seq" else trainer.test.tokens(i)
        labels = torch.from_numpy(asked.astype(np.int64))[None]
        with torch.no_grad():
            expected = trainer.model.eval()(input_ids=ids, labels=labels).loss
        count = len(asked) - (objective == "causal-lm")
        assert row["tokens"] == count
        assert row["loss"] / count == pytest.approx(expected.item(), rel=1e-4)
    rows = encoding.training_batch(len(trainer.train), 8, 0, 0)
    read = sum(map(len, trainer.train.texts(rows)))
    written = sum(map(len, trainer.train.targets(rows))) if objective == "seq2seq" else 0
    assert trainer.step(0)["tokens"] == read + written


@pytest.mark.parametrize("train", METHODS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_method_learns_and_the_arms_agree(make_trainer, native, objective, train):
    losses = {}
    for arm in ("fastattn", "sdpa"):
        trainer = make_trainer(objective, arm, train=train, lr=max(1e-3, default_lr(train)))
        losses[arm] = [trainer.step(1)["loss"] for _ in range(5)]  # one batch, over and over
    assert losses["fastattn"][-1] < losses["fastattn"][0]
    torch.testing.assert_close(losses["fastattn"], losses["sdpa"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_bfloat16_backbone(make_trainer, native, objective):
    for train in ("lora", "last-1"):
        trainer = make_trainer(objective, "fastattn", train=train, backbone_dtype="bfloat16")
        assert {p.dtype for p in trainer.optimizer.parameters.values()} == {torch.float32}
        expected = make_trainer(objective, train=train).step(0)["loss"]
        assert trainer.step(0)["loss"] == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_resuming_goes_on_with_the_same_losses(make_trainer, native, tmp_path, objective):
    whole = make_trainer(objective, "fastattn", train="prefix")
    losses = [whole.step(i)["loss"] for i in range(2)]
    whole.save_checkpoint(str(tmp_path / "c.pt"), 2)
    losses += [whole.step(i)["loss"] for i in range(2, 4)]
    again = make_trainer(objective, "fastattn", train="prefix")
    assert again.load_checkpoint(str(tmp_path / "c.pt")) == 2
    assert [again.step(i)["loss"] for i in range(2, 4)] == losses[2:]


def test_what_has_nothing_to_train_says_so(make_trainer):
    with pytest.raises(UserInputError, match="--train head: this model's head is its word embeddings"):
        make_trainer("seq2seq", train="head")
    with pytest.raises(UserInputError, match="--train bitfit: t5 has nothing of the kind"):
        make_trainer("seq2seq", train="bitfit")
    model = make_trainer("causal-lm", train="head").model
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]


def test_a_causal_text_ends_unless_it_is_cut(make_trainer):
    train = make_trainer("causal-lm").train
    ends = [text[-1] == 1 for text in train.texts(range(len(train)))]
    assert ends == [len(text) < TEXT or text[-1] == 1 for text in train.texts(range(len(train)))]
    assert any(ends)
    assert not all(ends)
    assert train.truncated == ends.count(False)


def test_guessing_by_frequency():
    ids, offsets = np.array([0, 1, 1, 1, 0, 2], np.int32), np.array([0, 4, 6])
    part = encoding.Encoded(ids, offsets, np.zeros(2), 0)
    # asked for: 1, 1, 1 of the first text and 2 of the second; counted once more than seen, 0 to 2
    expected = -(3 * np.log(4 / 7) + np.log(2 / 7)) / 4
    assert evaluation._frequency_loss(part, part, [0, 1]) == pytest.approx(expected)


def test_headlines_and_plain_texts():
    texts = [" ".join(f"w{i}" for i in range(n)) for n in (20, 15, 16)]
    examples = datasets.Examples(texts, [0, 1, 0])
    dataset = datasets.Dataset("news", ["a", "b"], examples, examples, "own")
    pairs = datasets.as_language(dataset, headlines=True).train
    assert pairs.targets == ["w0 w1 w2 w3 w4 w5 w6 w7"] * 2  # the text of 15 words is too short to have one
    assert pairs.texts[1] == "w8 w9 w10 w11 w12 w13 w14 w15"
    plain = datasets.as_language(dataset, headlines=False)
    assert plain.train == datasets.Examples(texts, [0, 0, 0])
    assert plain.label_names == []


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("seq2seq", ["--train", "lora"]),
        ("causal-lm", ["--train", "prefix"]),
        pytest.param("seq2seq", ["--train", "prompt", *COMPARED], marks=pytest.mark.slow),
        pytest.param("causal-lm", ["--train", "last-1", *COMPARED], marks=pytest.mark.slow),
    ],
)
def test_a_run_its_report_and_predict(
    tmp_path, pairs, language_model, seq2seq_model, native, capsys, objective, options
):
    out = tmp_path / "out"
    model = seq2seq_model if objective == "seq2seq" else language_model
    values = ["--model", model, "--data", pairs, "--steps", "3", "--batch-size", "8", "--max-length", "24"]
    assert main(["finetune", "--objective", objective, *values, *options, "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    test = report["test"]
    assert test["texts"] == 12
    assert test["perplexity"] == pytest.approx(np.exp(test["loss"]))
    assert 0 <= test["token_accuracy"] <= 1
    assert len(test["examples"]) == 6
    if "--compare" in options:
        assert max(report["comparison"]["dropout_off"]["loss_difference"].values()) < 1e-4
        check = report["plain_transformers"]
        assert check["loss"] == pytest.approx(check["loss_here"], rel=1e-4)
    for name in ("report.md", "report.html"):
        text = (out / name).read_text()
        for part in ("perplexity", objective, "frequencies", "what the model writes"):
            assert part in text, (name, part)
    capsys.readouterr()

    texts = ["yes w1 w2", "no w3 w4 w5"]
    command = ["predict", str(out / "model"), *texts, "--max-new-tokens", "5", "--json"]
    assert main(command) == 0
    ours = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in ours] == texts
    assert main([*command, "--attention", "eager"]) == 0
    eager = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["generated"] for row in ours] == [row["generated"] for row in eager]
