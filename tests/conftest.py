"""Fixtures for tests of attention: poisoned memory, fixed seeds, the CPU backend."""

from __future__ import annotations

import math

import pytest
import torch

from fastattn.dispatch import load

SIMULATIONS = (
    "tests/ptxsim/", "tests/backends/cuda/", "tests/backends/triton/test_simulated.py",
    "tests/backends/triton/test_faults.py",
)  # fmt: skip


def pytest_terminal_summary(terminalreporter):
    """How long the simulated GPUs took: in `make test`, three minutes at most on two quiet cores."""
    done = [*terminalreporter.stats.get("passed", ()), *terminalreporter.stats.get("failed", ())]
    seconds = [report.duration for report in done if report.nodeid.startswith(SIMULATIONS)]
    if seconds:
        terminalreporter.write_line(f"{sum(seconds):.0f} s in {len(seconds)} tests of simulated GPUs")


@pytest.fixture(autouse=True)
def _fresh_randomness(request):
    """Every test draws its own numbers, the same in every run."""
    torch.manual_seed(sum(map(ord, request.node.nodeid)))


@pytest.fixture
def cpu():
    """The CPU backend; the test is skipped where its library is not installed."""
    backend = load("cpu")
    if isinstance(backend, str):
        pytest.skip(backend)
    return backend


@pytest.fixture
def poisoned(monkeypatch):
    """New memory holds NaN, so that a result nobody wrote cannot pass for one."""

    def poison(function):
        def allocate(*args, **kwargs):
            tensor = function(*args, **kwargs)
            if tensor.is_floating_point():
                with torch.no_grad():
                    tensor.fill_(math.nan)
            return tensor

        return allocate

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poison(getattr(torch.Tensor, name)))
