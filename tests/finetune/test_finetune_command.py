"""`fastattn finetune` and `fastattn predict` from argument to output, in this process."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn.cli import main

PLAIN = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
logits = model(**tokenizer(sys.argv[2:], padding=True, return_tensors="pt")).logits
assert "fastattn" not in sys.modules
print(json.dumps([model.config.id2label[i] for i in logits.argmax(-1).tolist()]))
"""


@pytest.fixture(scope="module")
def arguments(tiny_model, table, native):
    return ["finetune", "--model", tiny_model, "--data", table, "--batch-size", "8", "--lr", "0.003"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, arguments):
    """One finished run of two methods."""
    out = tmp_path_factory.mktemp("runs") / "both"
    assert main([*arguments, "--train", "lora", "full", "--steps", "60", "--out", str(out)]) == 0
    return out


def test_a_run_leaves_what_it_says(finished):
    assert {path.name for path in finished.iterdir()} == {
        "run.json", "report.json", "report.md", "report.html", "lora", "full",
    }  # fmt: skip
    files = {"run.json", "report.json", "report.md", "report.html", "model"}
    assert {path.name for path in (finished / "full").iterdir()} == files
    assert {path.name for path in (finished / "lora").iterdir()} == files | {"adapter"}
    assert {path.name for path in (finished / "lora" / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip


def test_reports_hold_what_one_needs_to_judge_and_repeat(finished, table):
    both = json.loads((finished / "report.json").read_text())["runs"]
    assert [report["settings"]["train"] for report in both] == ["lora", "full"]
    report = json.loads((finished / "lora" / "report.json").read_text())
    assert report == both[0]
    assert report["status"] == "complete"
    assert len(report["training"]) == 60
    assert {"loss", "seconds", "tokens", "padded_tokens", "saved_bytes"} <= set(report["training"][0])
    assert 0 < report["data"]["padding_share"] < 1
    assert report["data"]["labels"] == ["no", "yes"]
    assert report["data"]["truncated"] > 0
    test = report["test"]
    assert test["texts"] == 12
    assert {"accuracy", "precision", "recall", "macro_f1"} <= set(test)
    assert sum(map(sum, test["confusion"])) == 12
    assert {"cpu", "isa", "cores"} <= set(report["machine"])
    assert {"torch", "transformers", "fastattn", "peft"} <= set(report["versions"])
    assert table in report["command"]
    for name in ("report.md", "report.html"):
        text = (finished / name).read_text()
        for part in ("Accuracy", "truncated", "padding", report["versions"]["torch"], "fastattn finetune"):
            assert part in text, (name, part)
    html = (finished / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 4
    assert "<script" not in html
    assert "http" not in html


def test_the_model_learns_the_task(finished):
    report = json.loads((finished / "full" / "report.json").read_text())
    assert report["test"]["accuracy"] > report["test"]["majority_class"] + 0.3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_plain_transformers_loads_the_model_and_predict_agrees(finished, method, capsys):
    model = str(finished / method / "model")
    texts = ["yes w1 w2", "no w3", "w4 yes w5 w6 w7"]
    done = subprocess.run([sys.executable, "-I", "-c", PLAIN, model, *texts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    capsys.readouterr()
    assert main(["predict", model, *texts]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == json.loads(done.stdout)
    assert [line[2] for line in lines] == texts
    assert all(0.5 <= float(line[1]) <= 1 for line in lines)


def test_peft_loads_the_adapter_and_agrees_with_the_merged_model(finished, tiny_model):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    load = AutoModelForSequenceClassification.from_pretrained
    adapted = PeftModel.from_pretrained(load(tiny_model, num_labels=2), finished / "lora" / "adapter").eval()
    merged = load(finished / "lora" / "model").eval()
    inputs = AutoTokenizer.from_pretrained(tiny_model)("yes w1 w2 w3", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(adapted(**inputs).logits, merged(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_predict_reads_files_and_standard_input_and_prints_json(finished, tmp_path, capsys, monkeypatch):
    model = str(finished / "full" / "model")
    lines = ["yes w1", "", "no w2 w3", " ".join(["w4"] * 50)]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    capsys.readouterr()
    assert main(["predict", model, "--file", str(tmp_path / "texts.txt"), "--json"]) == 0
    from_file = capsys.readouterr().out
    found = [json.loads(line) for line in from_file.splitlines()]
    assert [row["text"] for row in found] == [line for line in lines if line]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    assert main(["predict", model, "--json"]) == 0
    assert capsys.readouterr().out == from_file
    assert (
        main(["predict", model, "--json", "--attention", "eager", "--file", str(tmp_path / "texts.txt")]) == 0
    )
    eager = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for ours, theirs in zip(found, eager, strict=True):
        assert ours["label"] == theirs["label"]
        assert ours["probability"] == pytest.approx(theirs["probability"], abs=1e-4)


@pytest.mark.parametrize(
    "order", ["DIR yes no --json", "DIR --json yes no", "--json DIR yes no", "DIR yes --json no"]
)
def test_predict_takes_options_and_texts_in_any_order(order, finished, capsys):
    capsys.readouterr()
    words = order.split()
    words[words.index("DIR")] = str(finished / "full" / "model")
    assert main(["predict", *words]) == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == ["yes", "no"]


def test_without_out_a_fresh_folder_is_chosen(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main([*arguments, "--steps", "1"]) == 0
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"letters-head", "letters-head-2"}
    assert str(Path("runs/letters-head-2/report.html")) in capsys.readouterr().out


def test_test_texts_are_a_sample(arguments, tmp_path):
    assert main([*arguments, "--steps", "1", "--test-texts", "5", "--out", str(tmp_path / "o")]) == 0
    assert json.loads((tmp_path / "o" / "report.json").read_text())["test"]["texts"] == 5


def test_help_of_one_command_imports_no_other():
    code = (
        "import sys\nfrom fastattn.cli import main\n"
        "try:\n    main(['doctor', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'fastattn.finetune', 'transformers', 'matplotlib', 'sklearn'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
