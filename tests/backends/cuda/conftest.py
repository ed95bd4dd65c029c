"""The CUDA library built for the simulator, once per part of the table, kept between runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import simulated

from fastattn import dispatch

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """A slow test may have to compile its part of the table first, minutes at head dimension 256."""
    for item in items:
        if item.path.parent == FOLDER and item.get_closest_marker("slow") is not None:
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def library(request):
    """A function (dims, types, variants) -> path of the library; skips where there is no nvcc."""
    reason = simulated.why_not()
    if reason is not None:
        pytest.skip(reason)

    def build(dims: str, types: str, variants: str):
        name = "-".join((dims, types, variants)).replace(";", "_")
        return simulated.build(request.config.cache.mkdir(f"cuda-{name}"), dims, types, variants)

    return build


@pytest.fixture
def simulate(library, monkeypatch):
    """A function that puts a simulated GPU in the place of the CPU backend, and returns it."""
    devices = {}

    def use(dims: str, types: str, variants: str, capability: int = 80) -> simulated.SimulatedCuda:
        key = dims, types, variants
        if key not in devices:
            devices[key] = simulated.SimulatedCuda(library(*key))
        # Tests in one process share the library and what it remembers.
        devices[key].set_capability(capability)
        monkeypatch.setitem(dispatch._backends, "cpu", devices[key])
        monkeypatch.setattr(dispatch, "_chosen", {})
        return devices[key]

    return use
