"""The held-out texts: what a trained arm says of them, as the report's "test"."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fastattn.finetune import encoding, metrics
from fastattn.finetune.arms import LocalArm, RemoteArm
from fastattn.finetune.datasets import Dataset
from fastattn.finetune.progress import Bar
from fastattn.finetune.settings import Settings

__all__ = ["test_classes", "test_language"]

WRITTEN = 6  # texts that the report shows the model's own words for


def test_classes(
    arm: LocalArm | RemoteArm, dataset: Dataset, settings: Settings, stop: Callable[[], bool]
) -> dict | None:
    """Quality of the classes found, or None if interrupted."""
    found = _all_rows(arm, settings, stop)
    if found is None:
        return None
    rows = sorted(found)
    texts = [dataset.test.texts[i] for i in rows]
    true = [dataset.test.labels[i] for i in rows]
    predicted = [found[i]["label"] for i in rows]
    probabilities = [found[i]["probability"] for i in rows]
    names = dataset.label_names
    return metrics.quality(true, predicted, names) | {
        "examples": metrics.typical_examples(texts, true, predicted, probabilities, names),
        "rows": rows,
        "predicted": predicted,
    }


def test_language(
    arm: LocalArm | RemoteArm,
    train: encoding.Encoded,
    test: encoding.Encoded,
    settings: Settings,
    stop: Callable[[], bool],
) -> dict | None:
    """How well the model foresees each held-out token, and how well the tokens' frequencies would."""
    found = _all_rows(arm, settings, stop)
    if found is None:
        return None
    rows = sorted(found)
    tokens = sum(found[i]["tokens"] for i in rows)
    loss = sum(found[i]["loss"] for i in rows) / max(1, tokens)
    written = arm.call("write", rows=rows[:: max(1, len(rows) // WRITTEN)][:WRITTEN])
    return {
        "texts": len(rows),
        "tokens": tokens,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "token_accuracy": sum(found[i]["right"] for i in rows) / max(1, tokens),
        "frequency_loss": _frequency_loss(train, test, rows),
        "examples": written,
        "rows": rows,
        "row_losses": [found[i]["loss"] for i in rows],
    }


def _all_rows(arm, settings: Settings, stop: Callable[[], bool]) -> dict[int, dict] | None:
    found: dict[int, dict] = {}
    batches = arm.call("evaluation_batches", count=settings.test_texts)
    with Bar("testing", batches) as bar:
        for batch in range(batches):
            if stop():
                return None
            found.update((reply.pop("row"), reply) for reply in arm.call("evaluate", batch=batch))
            bar.advance()
    return found


def _frequency_loss(train: encoding.Encoded, test: encoding.Encoded, rows: list[int]) -> float:
    """Cross-entropy of guessing by how often a token occurred in training, each once more than counted."""
    asked, seen = (part.asked_tokens(chosen) for part, chosen in ((test, rows), (train, range(len(train)))))
    counts = np.bincount(seen, minlength=int(max(seen.max(initial=0), asked.max(initial=0))) + 1) + 1.0
    return float(-np.log(counts[asked] / counts.sum()).mean()) if len(asked) else 0.0
