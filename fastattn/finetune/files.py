"""The output folder: whose it is, and writing into it so that a failure leaves what was there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastattn.finetune.errors import UserInputError

__all__ = [
    "RUN_FILE",
    "abandon",
    "claim",
    "fresh_directory",
    "read_run",
    "replace_directory",
    "subfolder",
    "write_bytes",
    "write_json",
]

RUN_FILE = "run.json"  # marks a folder as a run's, and holds its settings


def fresh_directory(stem: Path) -> Path:
    """`stem`, or `stem-2`, `stem-3` … if that is taken."""
    candidates = (stem if n == 1 else stem.with_name(f"{stem.name}-{n}") for n in range(1, 10_000))
    return next(path for path in candidates if not path.exists() or _is_empty(path))


def claim(directory: Path) -> None:
    """Makes sure that `directory` is a new or empty folder of ours."""
    with _saving(directory):
        if directory.exists() and not directory.is_dir():
            raise UserInputError(f"--out {directory} is a file, not a folder")
        if directory.exists() and not _is_empty(directory):
            if (directory / RUN_FILE).is_file():
                raise UserInputError(
                    f"--out {directory} holds a run already; add --resume to continue it, or choose another"
                )
            raise UserInputError(f"--out {directory} holds something else; choose an empty or a new folder")
        directory.mkdir(parents=True, exist_ok=True)


def subfolder(directory: Path, name: str) -> Path:
    with _saving(directory / name):
        (directory / name).mkdir()
    return directory / name


def abandon(directory: Path, *worth: str) -> None:
    """Empties a claimed folder, unless something of these names is in it: then there is a run to resume."""
    if not any(path.name in worth for path in directory.rglob("*")):
        for path in directory.iterdir():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def read_run(directory: Path) -> dict:
    """What `RUN_FILE` says of the run in `directory`: its command, and its settings or those of its parts."""
    try:
        record = json.loads((directory / RUN_FILE).read_text("utf-8"))
        if not isinstance(record, dict) or not isinstance(record.get("command"), str):
            raise ValueError("it lacks the run's command")
        return record
    except (OSError, ValueError) as error:
        raise UserInputError(
            f"there is no run to resume in {directory}: it has no readable {RUN_FILE}"
        ) from error


def write_json(path: Path, value) -> None:
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Whole or not at all: written beside `path`, then moved over it."""
    part = path.with_name(f".{path.name}.part")
    with _saving(path, part):
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)


@contextlib.contextmanager
def replace_directory(path: Path) -> Iterator[Path]:
    """A folder to fill; it takes the place of `path` once the block has ended well."""
    part = path.with_name(f".{path.name}.part")
    with _saving(path, part):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)


@contextlib.contextmanager
def _saving(path: Path, part: Path | None = None) -> Iterator[None]:
    """Turns a full disk or a missing permission into one sentence, and removes what was half written."""
    try:
        yield
    except BaseException as error:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
        reason = _reason(error)
        if reason is None:
            raise
        raise UserInputError(
            f"could not save {path}: {reason}; what was there before is untouched"
        ) from error


def _reason(error: BaseException) -> str | None:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors and torch report the system's error inside a message of their own
    if type(error).__name__ == "SafetensorError" or (
        isinstance(error, RuntimeError) and "write" in str(error)
    ):
        return " ".join(str(error).split())
    return None


def _is_empty(directory: Path) -> bool:
    return directory.is_dir() and not any(directory.iterdir())
