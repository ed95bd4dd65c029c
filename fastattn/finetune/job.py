"""One run from texts to report: compare the arms, train the main one, test it, save it."""

from __future__ import annotations

import contextlib
import datetime
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastattn.finetune import comparison, datasets, encoding, evaluation, files, measure, plain
from fastattn.finetune import model as models
from fastattn.finetune.arms import LocalArm, RemoteArm
from fastattn.finetune.errors import UserInputError
from fastattn.finetune.progress import Bar, console
from fastattn.finetune.settings import ARMS, Settings

__all__ = ["fine_tune", "interruptible", "load_dataset"]

LANGUAGE_LENGTH = 512  # tokens of a text unless given: language models can read far more
CHECKPOINT, PROGRESS, ENCODED = "checkpoint.pt", "progress.json", "encoded.npz"


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
    if settings.objective != "classification":
        if not settings.data:
            dataset = datasets.load_task(settings.task, settings.data_dir)
            return datasets.as_language(dataset, headlines=settings.objective == "seq2seq")
        target = settings.target_column if settings.objective == "seq2seq" else None
        return datasets.load_language_file(settings.data, settings.text_column, target, settings.test_data)
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
    train, test = encoding.encode_dataset(
        dataset, tokenizer, max_length, directory / ENCODED, ended=settings.objective == "causal-lm"
    )
    notes = [*dataset.notes, *_truncation(train, test, max_length)]
    total = settings.total_steps(len(train))
    console.print(
        f"{dataset.name}: {len(train):,} training and {len(test):,} test texts, "
        f"{f'{len(dataset.label_names)} classes' if dataset.label_names else settings.objective}; "
        f"{settings.train}, {settings.dtype}, {total} steps of {settings.batch_size} texts"
    )
    for note in notes:
        console.print(f"Note: {note}.")

    files.write_json(directory / files.RUN_FILE, {"settings": settings.to_json(), "command": command})
    run = _Run(settings, directory, dataset, total, stop)
    try:
        run.start(resume)
        run.train()
        tested = run.test(train, test)
        if tested is not None:
            run.save()
        check = None
        if tested and settings.compare:
            check = plain.check(directory, settings, dataset, test, max_length, tested)
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

    def test(self, train: encoding.Encoded, test: encoding.Encoded) -> dict | None:
        """Quality on the test texts, or None if interrupted."""
        if self.stop():
            return None
        if self.settings.objective == "classification":
            return evaluation.test_classes(self.main, self.dataset, self.settings, self.stop)
        return evaluation.test_language(self.main, train, test, self.settings, self.stop)

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
        try:
            saved = json.loads((self.directory / PROGRESS).read_text("utf-8"))
            history, self.comparison, notes = saved["history"], saved["comparison"], saved["notes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserInputError(
                f"{self.directory / PROGRESS}, which goes with {CHECKPOINT}, cannot be read; "
                f"without {CHECKPOINT}, --resume starts the run anew"
            ) from error
        self.main = LocalArm(**self._arguments(self.settings.attention))
        self._prepared(self.main.call("prepare", dropout=True))
        step = self.main.call("load_checkpoint", path=str(checkpoint))
        self.history = history[:step]
        self.notes = [*notes, f"interrupted after step {step} and resumed"]
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


def _max_length(settings: Settings, tokenizer) -> int:
    """Tokens of a text, special ones included: as asked for, or as many as the model can read."""
    limit = encoding.longest_allowed(tokenizer, models.load_config(settings.model)) - settings.virtual_tokens
    language = settings.objective != "classification"
    besides = f" besides {settings.virtual_tokens} virtual ones" if settings.virtual_tokens else ""
    if limit < 3:
        raise UserInputError(f"{settings.model} reads too few tokens for {settings.train} tuning")
    least = tokenizer.num_special_tokens_to_add() + 1
    if settings.max_length and settings.max_length < least:
        raise UserInputError(
            f"--max-length {settings.max_length} leaves no room for a text: {settings.model} adds "
            f"{least - 1} special tokens to each"
        )
    if (settings.max_length or 0) > limit:
        raise UserInputError(
            f"--max-length {settings.max_length} is more than the {limit} tokens that {settings.model} "
            f"can read{besides}"
        )
    return settings.max_length or (min(limit, LANGUAGE_LENGTH) if language else limit)


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
