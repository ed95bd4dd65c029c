"""Starts the process in which Triton interprets (see interpreted/conftest.py) and reports for its tests."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    "selection",
    [
        pytest.param("not slow", marks=pytest.mark.timeout(900)),  # minutes of it are normal
        pytest.param("slow", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
    ids=["quick", "slow"],
)
def test_kernels_in_the_interpreter(selection):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        selection,
        "-p",
        "no:cacheprovider",
        os.fspath(FOLDER),
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[3])
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert " passed" in done.stdout
