"""Every wait, release, barrier and fence of the sm_90a forward kernel is needed: without it, a run fails.

Faults are planted in the PTX one at a time. The case makes the kernel go everywhere: masked and unmasked
steps, stages used again and, where the last value is NaN, the careful second pass.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from oracle import Case, run
from ptxsim import PtxError

CASE = Case(
    dtype=torch.float16, kv_heads=1, head_dim=64, head_dim_v=64, wanted=(),
    lengths=((128, 450),), options={"causal": True},
)  # fmt: skip

WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 complete, (\[%r\d+\]), (%r\d+);\n@!complete bra again;"
FLIPPED = (
    r"xor.b32 flipped, \2, 1;\nmbarrier.try_wait.parity.shared::cta.b64 complete, \1, flipped;\n"
    r"@!complete bra again;"
)
# What is looked for, what it becomes, and how many there are: producer and consumer, first pass and second.
FAULTS = {
    "a wait left out": (WAIT, "", 14),
    "a wait for the wrong phase": (rf"again:\n{WAIT}", f".reg .b32 flipped;\nagain:\n{FLIPPED}", 14),
    "a release left out": (r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", "", 8),
    "too many bytes expected": (r"(mbarrier\.arrive\.expect_tx\.\S+ _, \[%r\d+\]), %r\d+;", r"\1, 32768;", 5),
    "too few bytes expected": (r"(mbarrier\.arrive\.expect_tx\.\S+ _, \[%r\d+\]), %r\d+;", r"\1, 8192;", 5),
    "one product more in flight": (r"(wgmma\.wait_group\.sync\.aligned) 0;", r"\1 1;", 6),
    "two products in flight": (r"(wgmma\.wait_group\.sync\.aligned) 1;", r"\1 2;", 2),
    "a proxy fence left out": (r"fence\.proxy\.async\.shared::cta;", "", 1),
    "a barrier left out": (r"bar\.sync[ \t]+[^;]*;", "", 6),
    "an arrival at a barrier left out": (r"bar\.arrive[ \t]+[^;]*;", "", 3),
}  # fmt: skip


# Named barriers by which the two warpgroups take turns order nothing but time.
HARMLESS = {"a barrier left out": {1, 2, 3}}


def results(device, tensors) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """out, lse, and whether the careful pass ran, which would hide NaN that the first pass met."""
    found = run(CASE, tensors, {}, backend="cpu")
    ((_, report),) = device.launches
    return found["out"], found["lse"], report.count("fence.proxy.async") > 0


def same(a, b) -> bool:
    return a[2] == b[2] and all(
        torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a[:2], b[:2], strict=True)
    )


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(name, marks=() if name == "a proxy fence left out" else pytest.mark.slow)
        for name in FAULTS
    ],
)
def test_planted_faults_are_caught(simulate, fault):
    device = simulate("64", "f16", "plain", 90)
    finite = CASE.tensors()
    spoilt = {**finite, "v": finite["v"].clone()}
    spoilt["v"][:, :, -1] = math.nan
    clean = [(tensors, results(device, tensors)) for tensors in (spoilt, finite)]
    assert [careful for _, (_, _, careful) in clean] == [True, False]
    assert not clean[0][1][0][:, :, :-1].isnan().any()
    pattern, becomes, expected = FAULTS[fault]
    (path,) = {device._ptx[name] for name, _ in device.launches}
    text = path.read_text()
    places = [found.span() for found in re.finditer(pattern, text)]
    assert len(places) == expected

    def caught(begin: int, end: int) -> bool:
        altered = text[:begin] + re.sub(pattern, becomes, text[begin:end]) + text[end:]
        device.alter = lambda _: altered
        try:
            return not all(same(results(device, tensors), wanted) for tensors, wanted in clean)
        except PtxError:
            return True

    try:
        missed = {number for number, place in enumerate(places) if not caught(*place)}
    finally:
        device.alter = None
    assert missed == HARMLESS.get(fault, set())
