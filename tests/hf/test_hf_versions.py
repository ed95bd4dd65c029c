"""The oldest transformers supported is the same wherever it is written, and older ones are refused."""

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
import transformers

from fastattn.errors import MissingDependencyError
from fastattn.hf.versions import OLDEST as NUMBERS
from fastattn.hf.versions import TRANSFORMERS, check_version

ROOT = Path(__file__).parents[2]
OLDEST = ".".join(map(str, NUMBERS))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("pyproject.toml", f'"{TRANSFORMERS}"'),
        ("Makefile", f"OLDEST := transformers=={OLDEST}.0\n"),
        ("docs/families.md", f"transformers {OLDEST} "),
    ],
)
def test_the_lower_bound_is_written_once(file, text):
    assert text in (ROOT / file).read_text()


def test_older_versions_are_refused(monkeypatch):
    for version in ("4.57.6", "5.0.0", "5.14.1"):
        with pytest.raises(ImportError, match=f"transformers {version} is older"):
            check_version(version)
    for version in (f"{OLDEST}.0", "5.100.0", "6.0.0.dev0", transformers.__version__):
        check_version(version)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.14.1")
    monkeypatch.delitem(sys.modules, "fastattn.hf")
    with pytest.raises(MissingDependencyError, match=TRANSFORMERS):
        importlib.import_module("fastattn.hf")
