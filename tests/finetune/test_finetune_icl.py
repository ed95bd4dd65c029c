"""`fastattn icl`: what it prints and writes is what the plain model says of the concatenated text."""

import csv
import json
from pathlib import Path

import pytest
import torch

from fastattn.cli import main
from fastattn.finetune.datasets import Examples
from fastattn.finetune.demonstrations import Verbaliser, choose

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def icl(language_model, table, capsys):
    def run(*options, **changes):
        values = {"model": language_model, "demonstrations": table, "data": table, "shots": 6, **changes}
        given = [
            part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))
        ]
        try:
            code = main(["icl", *given, *options])
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


def test_labels_are_those_of_the_plain_model(icl, language_model, table, rows, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "labels.jsonl"
    code, stdout, _ = icl("--max-length", "20", "--seed", "3", "--batch-size", "7", "--texts", "10", out=out)
    assert code == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["text"] for row in found] == [text for text, _ in rows[:10]]
    assert [row["label"] for row in found] == [label for _, label in rows[:10]]
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    model = AutoModelForCausalLM.from_pretrained(language_model)
    verbaliser = Verbaliser(tokenizer, ["no", "yes"], 20)
    train = Examples([text for text, _ in rows], [int(label == "yes") for _, label in rows])
    prompt = verbaliser.prompt(choose(train, 6, 3))
    text = tokenizer.decode(prompt)
    assert text.startswith("<s>Text:")
    assert text.count("\nLabel: yes\n\n") == text.count("\nLabel: no\n\n") == 3
    for row in found:
        for name, label in zip(("no", "yes"), verbaliser.labels(), strict=True):
            query = verbaliser.query(row["text"])
            ids = torch.tensor([prompt + query + label])
            with torch.no_grad():
                logs = model(ids).logits[0, -len(label) - 1 : -1].log_softmax(-1)
            expected = logs.gather(1, torch.tensor(label)[:, None]).sum().item()
            assert row["log_likelihoods"][name] == pytest.approx(expected, rel=1e-4)
        assert row["predicted"] == max(row["log_likelihoods"], key=row["log_likelihoods"].get)
    lines = [line.split("\t") for line in stdout.splitlines() if line.count("\t") == 2]
    assert [line[0] for line in lines] == [row["predicted"] for row in found]


def test_csv_and_accuracy(icl, rows, tmp_path):
    out = tmp_path / "labels.csv"
    code, stdout, stderr = icl(out=out)
    assert code == 0
    with out.open() as file:
        found = list(csv.DictReader(file))
    assert len(found) == len(rows)
    right = sum(row["predicted"] == row["label"] for row in found)
    said = " ".join((stdout + stderr).split())
    assert f"accuracy {right / len(rows):.1%} on 60 labelled texts" in said
    # an untrained model: the honest word is there exactly when it is due
    assert ("no better than always naming the largest class" in said) == (right <= 30)
    unlabelled = tmp_path / "texts.tsv"
    unlabelled.write_text("body\n" + "".join(f"{text}\n" for text, _ in rows[:3]) + "\n")
    demonstrations = tmp_path / "shown.jsonl"
    demonstrations.write_text("".join(json.dumps({"body": t, "label": n}) + "\n" for t, n in rows))
    code, stdout, stderr = icl(
        "--text-column", "body", data=unlabelled, demonstrations=demonstrations, out=out
    )
    assert code == 0
    assert "accuracy" not in stdout + stderr
    with out.open() as file:
        assert list(next(csv.DictReader(file))) == ["text", "predicted", "probability"]


def test_demonstrations_hold_every_class_and_depend_on_the_seed():
    train = Examples([f"t{i}" for i in range(50)], [0] * 45 + [1] * 4 + [2])
    chosen = choose(train, 6, 0)
    assert set(chosen.labels) == {0, 1, 2}
    assert len(set(chosen.texts)) == 6
    assert chosen == choose(train, 6, 0)
    assert chosen != choose(train, 6, 1)


def test_bad_input(icl, tiny_model, table, tmp_path):
    def one_sentence(result, *expected):
        code, _, stderr = result
        assert code == 2
        assert "Traceback" not in stderr
        last = stderr.strip().splitlines()[-1]
        for part in ("fastattn icl: ", *expected):
            assert part in last

    one_sentence(icl(demonstrations=None), "--demonstrations FILE or --task")
    one_sentence(icl("--task", "topics"), "--demonstrations FILE or --task")
    one_sentence(icl(data=None), "--data FILE")
    one_sentence(icl(data=tmp_path / "no.csv"), "there is no file")
    one_sentence(icl("--text-column", "body"), "no column 'body'")
    one_sentence(icl("--out", str(tmp_path / "x.txt")), ".csv or a .jsonl")
    one_sentence(icl(shots=61), "--shots 61 is more than the 60")
    one_sentence(icl(shots=40), "reads 512; lower --shots")
    one_sentence(icl(model=tmp_path / "nowhere"), "cannot be loaded")
    one_sentence(icl("--max-length", "1", model=tiny_model, shots=1), "causal decoder")
    (tmp_path / "one.csv").write_text("text,label\na,x\nb,x\n")
    one_sentence(icl(demonstrations=tmp_path / "one.csv"), "one class only")
    (tmp_path / "blank.csv").write_text("text\n \n")
    one_sentence(icl(data=tmp_path / "blank.csv"), "no row with a text")
    assert not list(Path(tmp_path).glob("x.*"))
