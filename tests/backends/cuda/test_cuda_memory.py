"""How the kernels touch memory: no two lanes wait for one bank, and what is wide goes 16 bytes at a time.

wgmma's reads and TMA's writes of shared memory are not counted: the swizzle they share is the hardware's own.
"""

from __future__ import annotations

import pytest
from oracle import Case, check
from ptxsim.report import Report
from simulated import VARIANTS
from test_cuda_variants import GRADIENTS, TABLE, possible
from test_kernels import DTYPES

KERNELS = {"forward", "key_gradient", "query_gradient"}
WIDE = ("cp.async.cg.", "cp.async.bulk.tensor.", "st.global.v4.")
# What plain attention moves in smaller pieces: lse and statistics, which are numbers per row.
NARROW = {
    "forward": {"st.global.f32"},
    "key_gradient": {"cp.async.ca.shared.global", "ld.global.v2.f32"},
    "query_gradient": {"ld.global.v2.f32"},
}
PLAIN = {"lengths": ((130, 200),)}
EVERYTHING = {
    "lengths": ((70, 140),), "bias": (True, True, True, True), "relative_bias": True, "alibi": "heads",
    "wanted": (*GRADIENTS, "bias", "relative_bias"),
    "options": {"causal": True, "softcap": 10.0, "dropout_p": 0.2, "seed": 3},
}  # fmt: skip


def launches_of(device, type_: str, dim: int, fields: dict) -> dict[str, Report]:
    """The reports of a case's kernels, by their plain names."""
    base = {"dtype": DTYPES[type_], "kv_heads": 1, "head_dim": dim, "head_dim_v": dim}
    with device.recorded(statistics=True) as launches:
        check(Case(**{**base, **fields}))
    kernels = KERNELS | {"score_gradient"}
    found = {kernel: report for name, report in launches for kernel in kernels if f"{kernel}I" in name}
    assert found.keys() >= KERNELS
    return found


def hold(found: dict[str, Report], type_: str, plain: bool) -> None:
    for kernel, report in found.items():
        instrs = report.kernel.instrs
        conflicts = {index for index, (waves, fewest) in report.shared.items() if waves > fewest}
        assert report.shared, kernel
        if type_ == "f32" or kernel == "score_gradient":
            # Results pass through shared memory once a block, behind the last product (performance-cuda.md).
            last = max(index for index, instr in enumerate(instrs) if instr.op == "mma")
            conflicts = {index for index in conflicts if index < last}
        assert not conflicts, (kernel, [instrs[index].line for index in conflicts])
        for index, (sectors, fewest, _) in report.globals.items():
            if instrs[index].name.startswith(WIDE):
                assert sectors == fewest, (kernel, instrs[index].line)
            else:
                assert not plain or instrs[index].name in NARROW[kernel], (kernel, instrs[index].line)
        if kernel in KERNELS:
            assert any(instrs[index].name.startswith("st.global.v4.") for index in report.globals)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("options", [{}, pytest.param({"causal": True}, marks=pytest.mark.slow)], ids=str)
def test_plain(simulate, capability, options):
    device = simulate("64", "f16", "plain", capability)
    hold(launches_of(device, "f16", 64, {**PLAIN, "options": options}), "f16", True)


def test_everything(simulate):
    found = launches_of(simulate("32", "f16", VARIANTS), "f16", 32, EVERYTHING)
    assert "score_gradient" in found
    hold(found, "f16", False)


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "type_"), TABLE, ids=[f"{type_}-{dim}" for dim, type_ in TABLE])
def test_every_tile(simulate, type_, dim):
    device = simulate(str(dim), type_, VARIANTS)
    hold(launches_of(device, type_, dim, PLAIN), type_, True)
    if possible(type_, dim, EVERYTHING):
        hold(launches_of(device, type_, dim, EVERYTHING), type_, False)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("type_", ["f16", "bf16"])
def test_every_tile_of_hopper(simulate, type_, dim):
    hold(launches_of(simulate(str(dim), type_, VARIANTS, 90), type_, dim, PLAIN), type_, True)
