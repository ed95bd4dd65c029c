"""`fastattn finetune`."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from fastattn.finetune import settings as rules
from fastattn.finetune.errors import UserInputError

__all__ = ["add_arguments", "run"]

INTERRUPTED = 130

# What an argument is when it is not given. argparse's own defaults stay unset, so that --resume can tell.
DEFAULTS = {
    "model": "minilm",
    "task": None,
    "data": None,
    "test_data": None,
    "text_column": "text",
    "label_column": "label",
    "data_dir": None,
    "objective": "classification",
    "target_column": "target",
    "train": ["head"],
    "attention": "fastattn",
    "recompute": "auto",
    "feature_cache": None,
    "dtype": "float32",
    "backbone_dtype": None,
    "epochs": 1,
    "steps": None,
    "batch_size": 16,
    "max_length": None,
    "lr": None,
    "seed": 0,
    "compare": False,
    "compare_steps": 12,
    "test_texts": None,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.argument_default = argparse.SUPPRESS
    parser.epilog = "In parentheses: what holds unless you say otherwise."
    data = parser.add_argument_group("what to learn from")
    data.add_argument(
        "--task", choices=["sentiment", "topics", "reuters8", "reuters52"], help="a built-in task (reuters8)"
    )
    data.add_argument(
        "--data", metavar="FILE", help="your own texts instead: .csv, .tsv, .jsonl or .parquet, UTF-8"
    )
    data.add_argument("--text-column", metavar="NAME", help="of FILE (text)")
    data.add_argument("--label-column", metavar="NAME", help="of FILE (label)")
    data.add_argument("--target-column", metavar="NAME", help="of FILE, for seq2seq: the answers (target)")
    data.add_argument(
        "--test-data", metavar="FILE", help="held-out texts (a fixed fifth of each class of --data)"
    )
    data.add_argument(
        "--test-texts", type=positive, metavar="N", help="test on a stratified sample of N (on all)"
    )
    data.add_argument("--data-dir", metavar="DIR", help="where the built-in tasks' files are")

    model = parser.add_argument_group("what to train")
    model.add_argument(
        "--model", metavar="NAME_OR_DIR", help="any transformers model (minilm, an encoder that pip installs)"
    )
    model.add_argument(
        "--objective",
        choices=list(rules.OBJECTIVES),
        help="what it learns: a label, an answer to each text, or each text's next words (classification)",
    )
    model.add_argument(
        "--train",
        nargs="+",
        metavar="METHOD",
        help=f"one or more of {rules.METHODS}; each is a run of its own (head)",
    )
    model.add_argument(
        "--attention", choices=rules.ARMS, help="what computes attention in the main arm (fastattn)"
    )
    model.add_argument(
        "--recompute",
        choices=["auto", "all", "none"],
        help="what fastattn computes again in backward instead of saving it (auto)",
    )
    model.add_argument(
        "--feature-cache",
        metavar="DIR",
        help="with --train head: compute the backbone's features of each text once, without dropout in it, "
        "and keep them there",
    )
    model.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of weights and activations (float32); the optimizer is fp32",
    )
    model.add_argument(
        "--backbone-dtype",
        choices=["float32", "bfloat16"],
        help="of the frozen weights and their activations alone (as --dtype)",
    )

    how = parser.add_argument_group("how long and how fast")
    how.add_argument("--epochs", type=positive, metavar="N", help="(1)")
    how.add_argument("--steps", type=positive, metavar="N", help="this many updates instead of whole epochs")
    how.add_argument("--batch-size", type=positive, metavar="N", help="texts per update (16)")
    how.add_argument(
        "--max-length",
        type=positive,
        metavar="N",
        help="tokens per text; longer ones are cut (the model's limit)",
    )
    how.add_argument(
        "--lr", type=_rate, metavar="X", help="peak learning rate (by method: head 5e-3, lora 2e-3, ...)"
    )
    how.add_argument(
        "--seed", type=seed, metavar="N", help="of the head's weights, the batches and dropout (0)"
    )

    compare = parser.add_argument_group("comparison")
    compare.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help="let transformers' sdpa and eager attention make the first steps too, each in its own process",
    )
    compare.add_argument("--compare-steps", type=positive, metavar="N", help="how many (12)")

    out = parser.add_argument_group("where to")
    out.add_argument("--out", metavar="DIR", help="a new or empty folder (runs/TASK-METHOD)")
    out.add_argument("--resume", action="store_true", help="continue the interrupted run in --out")


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    given = {name: value for name, value in vars(arguments).items() if name in DEFAULTS}
    command = shlex.join(["fastattn", *argv])
    out = getattr(arguments, "out", None)
    if getattr(arguments, "resume", False):
        if out is None:
            raise UserInputError("--resume needs --out, the folder of the run to continue")
        return _resume(Path(out), given)
    return _start(given, Path(out) if out else None, command)


def _start(given: dict, out: Path | None, command: str) -> int:
    from fastattn.finetune import files
    from fastattn.finetune.job import CHECKPOINT, load_dataset

    runs = [_settings(given, method) for method in given.get("train", DEFAULTS["train"])]
    if len({run.train for run in runs}) < len(runs):
        raise UserInputError(f"--train {' '.join(run.train for run in runs)} names a method twice")
    load_dataset(runs[0])  # a typing error in a file name shall not leave a folder behind
    if out is None:
        name = Path(runs[0].data).stem if runs[0].data else runs[0].task
        out = files.fresh_directory(Path("runs") / "-".join([name, *(run.train for run in runs)]))
    files.claim(out)
    try:
        return _work(runs, _directories(out, runs, command), out, command, resume=False)
    except Exception:
        files.abandon(out, CHECKPOINT, "report.json")  # the same command, put right, shall find it free
        raise


def _directories(out: Path, runs: list[rules.Settings], command: str) -> list[Path]:
    """Where each run works: `out` itself, or a folder in it for each of several."""
    from fastattn.finetune import files

    if len(runs) == 1:
        return [out]
    files.write_json(out / files.RUN_FILE, {"runs": [run.train for run in runs], "command": command})
    for run in runs:
        settings = {"settings": run.to_json(), "command": command}
        files.write_json(files.subfolder(out, run.train) / files.RUN_FILE, settings)
    return [out / run.train for run in runs]


def _resume(out: Path, given: dict) -> int:
    from fastattn.finetune import files

    record = files.read_run(out)
    directories = [out / name for name in record["runs"]] if "runs" in record else [out]
    runs = [
        rules.Settings.from_json(files.read_run(directory).get("settings", {})) for directory in directories
    ]
    saved = runs[0].to_json() | {"train": [run.train for run in runs]}
    for name in saved.keys() & given.keys():
        same = {run.lr for run in runs} == {given["lr"]} if name == "lr" else saved[name] == given[name]
        if not same:
            option, was = "--" + name.replace("_", "-"), saved[name]
            was = " ".join(was) if name == "train" else was
            raise UserInputError(f"{option} is {was} in the run in {out}; resuming cannot change it")
    if all(
        (directory / "report.json").is_file() and (directory / "model").is_dir() for directory in directories
    ):
        raise UserInputError(f"the run in {out} is complete; there is nothing to resume")
    return _work(runs, directories, out, record["command"], resume=True)


def _work(runs: list[rules.Settings], directories: list[Path], out: Path, command: str, resume: bool) -> int:
    """Runs one after the other, reporting after each, so that an interruption leaves a report."""
    from fastattn.finetune import report
    from fastattn.finetune.job import fine_tune, interruptible
    from fastattn.finetune.progress import console

    reports = []
    with interruptible() as stop:
        for settings, directory in zip(runs, directories, strict=True):
            if resume and (directory / "model").is_dir():
                reports.append(report.read(directory))
                continue
            if stop():
                break
            reports.append(fine_tune(settings, directory, command, stop, resume))
            report.write(directory, reports[-1:])
            if directory != out:
                report.write(out, reports)
    console.print(report.summary(reports))
    console.print(f"Report: {out / 'report.html'} (also report.md, report.json)")
    if stop():
        console.print(f"Interrupted. To go on: fastattn finetune --out {shlex.quote(str(out))} --resume")
        return INTERRUPTED
    return 0


def _settings(given: dict, method: str) -> rules.Settings:
    values = {**DEFAULTS, **given, "train": rules.check_method(method)}
    if values["data"] is None and values["task"] is None:
        values["task"] = "reuters8"
    if values["data"] is not None and values["task"] is not None:
        raise UserInputError("--task and --data are two sources of texts; give one")
    if values["test_data"] is not None and values["data"] is None:
        raise UserInputError("--test-data goes with --data; the built-in tasks have test sets of their own")
    if values["lr"] is None:
        values["lr"] = rules.default_lr(method)
    rules.check_objective(values["objective"], given)
    values["backbone_dtype"] = values["backbone_dtype"] or values["dtype"]
    rules.check_dtypes(method, values["dtype"], values["backbone_dtype"])
    rules.check_feature_cache(values)
    return rules.Settings(**values)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 10:
        raise argparse.ArgumentTypeError(f"{text} is not a learning rate between 0 and 10")
    return value
