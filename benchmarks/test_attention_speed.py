"""`pytest benchmarks --benchmark-autosave`; after a change `--benchmark-compare` shows what it brought.

Nothing here asserts a time.
"""

from __future__ import annotations

import pytest

import fastattn
from fastattn.bench.contenders import Refusal, make
from fastattn.bench.grid import MASKS, PASSES, SHAPES, Cell, Inputs

SHORT = [shape for shape in SHAPES if shape[2] <= 2048]


def cpu_backend_reason() -> str:
    return next(status.reason for status in fastattn.backends() if status.name == "cpu")


@pytest.mark.skipif(cpu_backend_reason() != "", reason=f"cpu backend: {cpu_backend_reason()}")
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHORT, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("contender", ["fastattn", "sdpa"])
def test_attention(benchmark, contender, shape, mask, dtype, direction):
    cell = Cell(*shape, mask, dtype, direction)
    try:
        step = make(contender, Inputs(cell), "cpu")
    except Refusal as refusal:
        pytest.skip(str(refusal))
    benchmark.extra_info["gflop"] = cell.flops / 1e9
    benchmark(step)
