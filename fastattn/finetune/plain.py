"""The saved model in plain transformers and a process that never imports fastattn: does it say the same?"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from fastattn.finetune.arms import ArmError
from fastattn.finetune.datasets import Dataset
from fastattn.finetune.encoding import Encoded, stratified_sample
from fastattn.finetune.objectives import OBJECTIVES
from fastattn.finetune.settings import Settings

__all__ = ["check"]

LABELLED, READ = 256, 32  # test texts to label; and, one at a time, to read as a language model


def check(
    directory: Path, settings: Settings, dataset: Dataset, test: Encoded, max_length: int, tested: dict
) -> dict:
    """What plain transformers makes of some of the test texts, beside what the run made of them."""
    objective = OBJECTIVES[settings.objective]
    request = {"model": str(directory / "model"), "auto_class": objective.auto_class}
    if objective.is_language:
        return _losses(request, settings, test, tested)
    labels = np.array([dataset.test.labels[i] for i in tested["rows"]])
    chosen = stratified_sample(labels, LABELLED)
    rows = [tested["rows"][i] for i in chosen]
    theirs = _ask({**request, "texts": [dataset.test.texts[row] for row in rows], "max_length": max_length})
    ours = [tested["predicted"][i] for i in chosen]
    return {
        "texts": len(rows),
        "accuracy": float(np.mean(np.array(theirs) == labels[chosen])),
        "accuracy_here": float(np.mean(np.array(ours) == labels[chosen])),
        "different_labels": sum(a != b for a, b in zip(theirs, ours, strict=True)),
    }


def _losses(request: dict, settings: Settings, test: Encoded, tested: dict) -> dict:
    count = min(READ, len(tested["rows"]))
    rows = tested["rows"][:count]
    targets = [ids.tolist() for ids in test.targets(rows)] if settings.objective == "seq2seq" else None
    theirs = _ask({**request, "ids": [ids.tolist() for ids in test.texts(rows)], "targets": targets})
    tokens = max(1, len(test.asked_tokens(rows)))
    here = sum(tested["row_losses"][:count]) / tokens
    return {"texts": count, "loss": sum(theirs) / tokens, "loss_here": here}


def _ask(request: dict) -> list:
    script = Path(__file__).with_name("plain_check.py")
    done = subprocess.run(
        [sys.executable, "-I", str(script)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise ArmError(f"the saved model did not load in plain transformers: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
