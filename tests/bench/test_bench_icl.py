"""benchmarks/bench_icl.py runs, and its three contenders score alike."""

import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_icl.py"


def test_contenders_score_alike(monkeypatch, capsys):
    sizes = {"prompt": 40, "queries": 3, "tokens": 5, "layers": 2, "hidden": 64, "kv-heads": 1}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options, "--threads", "1", "--seconds", "0"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["repeated", "expanded", "shared"]
    for line in lines:
        assert float(re.search(r"difference from repeated (\S+)", line)[1]) < 1e-5
    held = {line.split()[0]: re.search(r"held (\S+) MiB", line) for line in lines}
    assert float(held["expanded"][1]) > 2 * float(held["shared"][1])  # three queries, and their own tokens
