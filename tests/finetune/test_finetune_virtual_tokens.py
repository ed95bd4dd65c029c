"""--train prefix and prompt: learned, compared, saved for transformers and peft, and read back by predict."""

import json
import subprocess
import sys

import pytest
import torch

from fastattn.cli import main
from fastattn.finetune.errors import UserInputError
from fastattn.finetune.methods import choose_trained
from fastattn.finetune.objectives import OBJECTIVES

pytest.importorskip("peft")

PLAIN = """
import json, sys
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer(sys.argv[2:], padding=True, return_tensors="pt")
base = AutoModelForSequenceClassification.from_pretrained(sys.argv[1] + "/base")
model = PeftModel.from_pretrained(base, sys.argv[1]).eval()
logits = model(**inputs).logits
names = model.config.id2label
again = AutoPeftModelForSequenceClassification.from_pretrained(sys.argv[1], num_labels=len(names)).eval()
assert (again(**inputs).logits == logits).all()
try:
    AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
    raise SystemExit("transformers alone loads it, without the virtual tokens")
except ValueError:
    pass
assert "fastattn" not in sys.modules
probability, label = logits.softmax(-1).max(-1)
print(json.dumps([[names[i], p] for i, p in zip(label.tolist(), probability.tolist())]))
"""


def test_a_model_that_takes_no_keys_and_values_learns_a_prompt_and_no_prefix():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    shape = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    config = DistilBertConfig(vocab_size=50, max_position_embeddings=40, **shape)
    model = DistilBertForSequenceClassification(config)
    with pytest.raises(UserInputError, match="--train prefix: distilbert takes no keys and values"):
        choose_trained(model, "prefix", OBJECTIVES["classification"])
    adapted = choose_trained(model, "prompt", OBJECTIVES["classification"])
    ids = torch.arange(5, 15)[None]
    adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"prompt_encoder", "base_model"}


def test_a_prompt_is_as_wide_as_the_embeddings():
    from transformers import ElectraConfig, ElectraForSequenceClassification

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ElectraConfig(vocab_size=50, embedding_size=8, max_position_embeddings=40, **shape)
    model = ElectraForSequenceClassification(config)
    adapted = choose_trained(model, "prompt", OBJECTIVES["classification"])
    assert adapted.prompt_encoder["default"].embedding.weight.shape == (20, 8)
    ids = torch.arange(5, 15)[None]
    assert adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape == (1, 2)


@pytest.mark.parametrize(
    ("method", "compared"),
    [("prefix", False), ("prompt", False), pytest.param("prefix", True, marks=pytest.mark.slow)],
)
def test_a_run_and_its_saved_model(method, compared, tmp_path, tiny_model, table, native, capsys):
    out = tmp_path / "out"
    options = ["--train", method, "--steps", "4", "--batch-size", "8"]
    options += ["--compare", "--compare-steps", "2"] if compared else []
    assert main(["finetune", "--model", tiny_model, "--data", table, "--out", str(out), *options]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["max_length"] == 32 - 20
    if compared:
        assert max(report["comparison"]["dropout_off"]["loss_difference"].values()) < 1e-5
        assert report["plain_transformers"]["texts"] == 12
        assert report["plain_transformers"]["different_labels"] == 0
    capsys.readouterr()

    texts = ["yes w1 w2", "no w3", "w4 yes w5 w6 w7"]
    model = str(out / "model")
    done = subprocess.run([sys.executable, "-I", "-c", PLAIN, model, *texts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert main(["predict", model, *texts, " ".join(["w1"] * 50), "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    ours = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["label"] for row in ours[:3]] == [label for label, _ in theirs]
    for row, (_, probability) in zip(ours, theirs, strict=False):
        assert row["probability"] == pytest.approx(probability, abs=1e-5)
