"""One run from texts to report: compare the arms, train the main one, test it, save it."""

from __future__ import annotations

import contextlib
import datetime
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastattn.finetune import comparison, datasets, encoding, files, measure, metrics
from fastattn.finetune import model as models
from fastattn.finetune.arms import ArmError, LocalArm, RemoteArm
from fastattn.finetune.errors import UserInputError
from fastattn.finetune.progress import Bar, console
from fastattn.finetune.settings import ARMS, Settings

__all__ = ["fine_tune", "interruptible", "load_dataset"]

CHECKPOINT, PROGRESS, ENCODED = "checkpoint.pt", "progress.json", "encoded.npz"
PLAIN_CHECK_TEXTS = 256


class Stop:
    """Becomes true at the first Ctrl-C; the second one interrupts at once."""

    def __init__(self):
        self._asked = False

    def __call__(self) -> bool:
        return self._asked

    def ask(self, *_) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        console.print(
            "Stopping after this step, with a checkpoint and a partial report. Ctrl-C again: at once."
        )


@contextlib.contextmanager
def interruptible() -> Iterator[Stop]:
    stop = Stop()
    before = signal.signal(signal.SIGINT, stop.ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def load_dataset(settings: Settings) -> datasets.Dataset:
    if settings.data:
        columns = settings.text_column, settings.label_column
        return datasets.load_file(settings.data, *columns, settings.test_data)
    return datasets.load_task(settings.task, settings.data_dir)


def fine_tune(settings: Settings, directory: Path, command: str, stop: Stop, resume: bool = False) -> dict:
    """Runs the job in `directory`, which the caller has claimed or, to resume, read the settings from.

    Returns:
        The report as in report.json. Its "status" is "complete", or "interrupted" if it can be resumed.
    """
    dataset = load_dataset(settings)
    tokenizer = models.load_tokenizer(settings.model)
    max_length = _max_length(settings, tokenizer)
    train, test = encoding.encode_dataset(dataset, tokenizer, max_length, directory / ENCODED)
    notes = [*dataset.notes, *_truncation(train, test, max_length)]
    total = settings.total_steps(len(train))
    console.print(
        f"{dataset.name}: {len(train):,} training and {len(test):,} test texts, {len(dataset.label_names)} "
        f"classes; {settings.train}, {settings.dtype}, {total} steps of {settings.batch_size} texts"
    )
    for note in notes:
        console.print(f"Note: {note}.")

    files.write_json(directory / files.RUN_FILE, {"settings": settings.to_json(), "command": command})
    run = _Run(settings, directory, dataset, total, stop)
    try:
        run.start(resume)
        run.train()
        tested = run.test(encoding.stratified_sample(test.labels, settings.test_texts))
        if tested is not None:
            run.save()
        check = _plain_check(directory, dataset, max_length, tested) if tested and settings.compare else None
    finally:
        run.close()
    complete = tested is not None
    report = {
        "status": "complete" if complete else "interrupted",
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "settings": settings.to_json() | {"max_length": max_length, "total_steps": total},
        "data": _describe(dataset, train, test, settings) | run.padding(),
        "machine": measure.machine(),
        "versions": measure.versions(),
        "parameters": run.parameters,
        "training": run.history,
        "comparison": run.comparison,
        "test": tested,
        "plain_transformers": check,
        "notes": notes + run.notes,
    }
    if complete:
        for name in (CHECKPOINT, PROGRESS, ENCODED):
            (directory / name).unlink(missing_ok=True)
    return report


class _Run:
    """The state of one run: its arms, the steps made, what the comparison found."""

    def __init__(
        self, settings: Settings, directory: Path, dataset: datasets.Dataset, total: int, stop: Stop
    ):
        self.settings, self.directory, self.dataset, self.total, self.stop = (
            settings,
            directory,
            dataset,
            total,
            stop,
        )
        self.main: LocalArm | RemoteArm | None = None
        self.history: list[dict] = []
        self.comparison: dict | None = None
        self.parameters: dict = {}
        self.notes: list[str] = []
        self._ready = (
            False  # the main arm stands at a step of the training proper, so a checkpoint means something
        )

    def start(self, resume: bool) -> None:
        """The main arm, ready to go on: from a checkpoint, from the comparison's end, or from nothing."""
        checkpoint = self.directory / CHECKPOINT
        if resume and checkpoint.is_file():
            self._resume(checkpoint)
        elif self.settings.compare:
            self._compare()
        else:
            self.main = LocalArm(**self._arguments(self.settings.attention))
            self._prepared(self.main.call("prepare", dropout=True))

    def train(self) -> None:
        per_epoch = -(-len(self.dataset.train) // self.settings.batch_size)
        with Bar(f"training ({self.settings.attention})", self.total, len(self.history)) as bar:
            while len(self.history) < self.total and not self.stop():
                step = self.main.call("step", index=len(self.history))
                self.history.append(step)
                bar.advance(step["seconds"], step["tokens"], step["loss"])
                if len(self.history) % per_epoch == 0:
                    self._checkpoint()
        self._checkpoint()

    def test(self, rows: np.ndarray) -> dict | None:
        """Quality on these test texts, or None if interrupted."""
        if self.stop():
            return None
        found: dict[int, tuple[int, float]] = {}
        batches = self.main.call("evaluation_batches", count=self.settings.test_texts)
        with Bar("testing", batches) as bar:
            for batch in range(batches):
                if self.stop():
                    return None
                reply = self.main.call("evaluate", batch=batch)
                pairs = zip(reply["labels"], reply["probabilities"], strict=True)
                found.update(zip(reply["rows"], pairs, strict=True))
                bar.advance()
        texts = [self.dataset.test.texts[i] for i in rows]
        true = [self.dataset.test.labels[i] for i in rows]
        predicted, probabilities = [found[i][0] for i in rows], [found[i][1] for i in rows]
        names = self.dataset.label_names
        return metrics.quality(true, predicted, names) | {
            "examples": metrics.typical_examples(texts, true, predicted, probabilities, names),
            "rows": [int(i) for i in rows],
            "predicted": predicted,
        }

    def save(self) -> None:
        written = self.main.call("save", directory=str(self.directory))
        console.print(f"Saved {' and '.join(str(self.directory / name) for name in written)}.")

    def padding(self) -> dict:
        """How much of the batches trained on was padding: what a padded model computes in vain."""
        padded = sum(step["padded_tokens"] for step in self.history)
        return {
            "padding_share": 1 - sum(step["tokens"] for step in self.history) / padded if padded else None
        }

    def close(self) -> None:
        if self.main is not None:
            self._keep_notes(self.settings.attention, self.main)
            self.main.close()
        for log in self.directory.glob("arm-*.log"):
            log.unlink()

    def _arguments(self, attention: str) -> dict:
        return {
            "settings": self.settings.to_json(),
            "label_names": self.dataset.label_names,
            "attention": attention,
            "encoded": str(self.directory / ENCODED),
        }

    def _compare(self) -> None:
        main = self.settings.attention
        names = [main, *(name for name in ARMS if name != main)]
        arms: dict[str, RemoteArm] = {}
        try:
            for name in names:  # all of them start up at once
                arms[name] = RemoteArm(self.directory / f"arm-{name}.log", **self._arguments(name))
            for arm in arms.values():
                arm.receive()
            off = comparison.step_in_turn(
                arms, comparison.LOSS_STEPS, False, "comparing, dropout off", self.stop
            )
            if self.stop():
                self.comparison = {"dropout_off": comparison.summarise(off, main)}
                return
            steps = min(self.settings.compare_steps, self.total)
            on = comparison.step_in_turn(arms, steps, True, "comparing, as trained", self.stop)
            self.main = arms.pop(main)
            self._prepared(on[main])
            self.history = on[main]["steps"]
            self.comparison = {
                "dropout_off": comparison.summarise(off, main),
                "train_mode": comparison.summarise(on, main),
            }
        finally:
            for name, arm in arms.items():
                self._keep_notes(name, arm)
                arm.close()

    def _resume(self, checkpoint: Path) -> None:
        saved = json.loads((self.directory / PROGRESS).read_text("utf-8"))
        self.main = LocalArm(**self._arguments(self.settings.attention))
        self._prepared(self.main.call("prepare", dropout=True))
        step = self.main.call("load_checkpoint", path=str(checkpoint))
        self.history, self.comparison = saved["history"][:step], saved["comparison"]
        self.notes = [*saved["notes"], f"interrupted after step {step} and resumed"]
        console.print(f"Resuming after step {step} of {self.total}.")

    def _prepared(self, reply: dict) -> None:
        self.parameters = {"trained": reply["trained_parameters"], "all": reply["parameters"]}
        self._ready = True

    def _checkpoint(self) -> None:
        if self._ready:
            progress = {"history": self.history, "comparison": self.comparison, "notes": self.notes}
            files.write_json(self.directory / PROGRESS, progress)
            self.main.call("save_checkpoint", path=str(self.directory / CHECKPOINT), step=len(self.history))

    def _keep_notes(self, name: str, arm: LocalArm | RemoteArm) -> None:
        self.notes.extend(f"{name}: {note}" for note in arm.notes)


def _plain_check(directory: Path, dataset: datasets.Dataset, max_length: int, tested: dict) -> dict:
    """The saved model in plain transformers and a process that never imports fastattn: the same labels?"""
    labels = np.array([dataset.test.labels[i] for i in tested["rows"]])
    chosen = encoding.stratified_sample(labels, PLAIN_CHECK_TEXTS)
    rows = [tested["rows"][i] for i in chosen]
    request = {
        "model": str(directory / "model"),
        "texts": [dataset.test.texts[row] for row in rows],
        "max_length": max_length,
    }
    script = Path(__file__).with_name("plain_check.py")
    done = subprocess.run(
        [sys.executable, "-I", str(script)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ArmError(
            f"the saved model did not load in plain transformers: {done.stderr.strip().splitlines()[-1]}"
        )
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = [tested["predicted"][i] for i in chosen]
    return {
        "texts": len(rows),
        "accuracy": float(np.mean(np.array(theirs) == labels[chosen])),
        "accuracy_here": float(np.mean(np.array(ours) == labels[chosen])),
        "different_labels": sum(a != b for a, b in zip(theirs, ours, strict=True)),
    }


def _max_length(settings: Settings, tokenizer) -> int:
    """Tokens of a text, special ones included: as asked for, or as many as the model can read."""
    limit = encoding.longest_allowed(tokenizer, models.load_config(settings.model)) - settings.virtual_tokens
    besides = f" besides {settings.virtual_tokens} virtual ones" if settings.virtual_tokens else ""
    if limit < 1:
        raise UserInputError(f"{settings.model} reads too few tokens for {settings.train} tuning")
    if (settings.max_length or 0) > limit:
        raise UserInputError(
            f"--max-length {settings.max_length} is more than the {limit} tokens that {settings.model} "
            f"can read{besides}"
        )
    return settings.max_length or limit


def _truncation(train: encoding.Encoded, test: encoding.Encoded, max_length: int) -> list[str]:
    cut, count = int(train.truncated + test.truncated), len(train) + len(test)
    return [f"truncated {cut:,} of {count:,} texts to {max_length} tokens"] if cut else []


def _describe(dataset, train: encoding.Encoded, test: encoding.Encoded, settings: Settings) -> dict:
    lengths = train.lengths
    return {
        "name": dataset.name,
        "source": settings.data or f"the built-in task {settings.task}",
        "train_texts": len(train),
        "test_texts": len(test),
        "split": dataset.split,
        "labels": dataset.label_names,
        "truncated": int(train.truncated + test.truncated),
        "tokens": {
            "mean": float(lengths.mean()),
            "median": float(np.median(lengths)),
            "p90": float(np.percentile(lengths, 90)),
            "longest": int(lengths.max()),
        },
    }
