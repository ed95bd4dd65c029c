"""The host takes Hopper's kernels where the model says that they are faster, and only there.

The model: cycles of the busiest unit for each 1024 weights, counted in main_loops.json from the machine code
that a Hopper device gets of either kernel. mma.sync is given wgmma's rate, which it does not reach.
"""

from __future__ import annotations

import json

import pytest
from oracle import Case, check
from test_hopper import BACKWARD, HALF, KERNEL, names
from test_statistics import TABLE

GAIN = 1.25  # what a model must promise


def busiest(instance: str, kernel: str) -> float:
    """Cycles for 1024 weights; of dk and dv, for both."""
    kernels = json.loads(TABLE.read_text())[instance]
    parts = [found for name, found in kernels.items() if name.split()[0] == kernel]
    return sum(map(_busiest, parts))


def _busiest(found: dict) -> float:
    loop = found["main_loop"]
    weights = 32 * (loop["exponentials"] // 8 * 8)  # the others are of the softmax's base
    tensor = loop["tensor_cycles"] * (0.5 if "HMMA" in loop["matrix_kinds"][0][:4] else 1)
    issue = loop["instructions"] - found.get("jumped_over", 0)
    others = loop["mufu_cycles"], loop["fp32_cycles"], loop["alu_cycles"], found["shared_cycles"]
    return 1024 / weights * max(tensor, issue, *others)


@pytest.mark.parametrize(("dim", "padded", "chosen"), [(32, 64, False), (96, 128, True), (256, 256, True)])
def test_the_model_agrees(dim, padded, chosen):
    gains = {
        kernel: busiest(f"sm_90 Half {dim} 0", kernel) / busiest(f"sm_90a Half {padded}", kernel)
        for kernel in ("forward", "key_gradient", "query_gradient")
    }
    assert all((gain >= GAIN) is chosen for gain in gains.values()), gains


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "built", "chosen"), [(20, "32;64", False), (80, "96;128", True)])
def test_the_host_agrees(simulate, dim, built, chosen):
    device = simulate(built, "f16", "plain", 90)
    dims = {"head_dim": dim, "head_dim_v": dim}
    for wanted, kernels in (((), {KERNEL}), (("q", "k", "v"), set(BACKWARD.values()))):
        check(
            Case(**{**HALF, **dims, "lengths": ((70, 140),), "wanted": wanted})
        )  # launches: the last call's
        for kernel in kernels:
            assert any(kernel in name for name in names(device)) is chosen
