"""Every wait, release, barrier and fence of the sm_90a kernels is needed: without it, a run fails.

Faults are planted in the PTX one at a time. The cases make the kernels go everywhere: masked and unmasked
steps, stages used again, tails of packed sequences and, where a value is NaN, the careful second pass.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import pytest
import torch
from oracle import Case, run, upstream_of
from ptxsim import PtxError
from ptxsim.parser import parse

BASE = {"dtype": torch.float16, "kv_heads": 1, "head_dim": 64, "head_dim_v": 64, "options": {"causal": True}}


@dataclass(frozen=True)
class Kernel:
    """A kernel, its case, the input whose last row a second run spoils, and the faults of each kind."""

    name: str
    case: Case
    results: tuple[str, ...]
    spoil: str | None
    counts: tuple[int, ...]


WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 complete, (\[%r\d+\]), (%r\d+);\n@!complete bra again;"
FLIPPED = (
    r"xor.b32 flipped, \2, 1;\nmbarrier.try_wait.parity.shared::cta.b64 complete, \1, flipped;\n"
    r"@!complete bra again;"
)
EXPECT = r"(mbarrier\.arrive\.expect_tx\.\S+ _, \[%r\d+\]), %r\d+;"
# What is looked for, and what it becomes.
FAULTS = {
    "a wait left out": (WAIT, ""),
    "a wait for the wrong phase": (rf"again:\n{WAIT}", f".reg .b32 flipped;\nagain:\n{FLIPPED}"),
    "an arrival left out": (r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];", ""),
    "too many bytes expected": (EXPECT, r"\1, 65536;"),
    "too few bytes expected": (EXPECT, r"\1, 4096;"),
    "one product more in flight": (r"(wgmma\.wait_group\.sync\.aligned) 0;", r"\1 1;"),
    "two products in flight": (r"(wgmma\.wait_group\.sync\.aligned) 1;", r"\1 2;"),
    "a proxy fence left out": (r"fence\.proxy\.async\.shared::cta;", ""),
    "a barrier left out": (r"bar\.sync[ \t]+[^;]*;", ""),
    "an arrival at a barrier left out": (r"bar\.arrive[ \t]+[^;]*;", ""),
}
KERNELS = {
    "forward": Kernel(
        "sm907forward", Case(**BASE, lengths=((128, 450),), wanted=()), ("out", "lse"), "v",
        (14, 14, 8, 5, 5, 6, 2, 1, 6, 3),
    ),
    "dk and dv": Kernel(
        "sm9012key_gradient", Case(**BASE, lengths=((300, 300), (3, 3)), packed=True, wanted=("k", "v")),
        ("dk", "dv"), None, (9, 9, 5, 3, 3, 3, 4, 1, 2, 0),
    ),
    "dq": Kernel(
        "sm9014query_gradient", Case(**BASE, lengths=((128, 450),), wanted=("q",)), ("dq",), "k",
        (12, 12, 7, 5, 5, 5, 2, 1, 3, 0),
    ),
}  # fmt: skip
# Named barriers by which the two warpgroups take turns order nothing but time.
HARMLESS = {("forward", "a barrier left out"): {1, 2, 3}}
QUICK = ("forward", "a proxy fence left out")


def results(device, kernel: Kernel, tensors, upstream) -> tuple[list[torch.Tensor], int]:
    """What the kernel wrote, and how often it fenced.

    That tells whether the careful pass ran, which would hide NaN that the first pass met.
    """
    found = run(kernel.case, tensors, upstream, backend="cpu")
    (report,) = [report for name, report in device.launches if kernel.name in name]
    return [found[name].nan_to_num(7.0) for name in kernel.results], report.count("fence.proxy.async")


def same(a, b) -> bool:
    return a[1] == b[1] and all(map(torch.equal, a[0], b[0]))


@pytest.mark.parametrize(
    ("which", "fault"),
    [
        pytest.param(which, fault, marks=() if (which, fault) == QUICK else pytest.mark.slow)
        for which in KERNELS
        for fault in FAULTS
    ],
)
def test_planted_faults_are_caught(simulate, which, fault):
    device = simulate("64", "f16", "plain", 90)
    kernel = KERNELS[which]
    finite = kernel.case.tensors()
    upstream = upstream_of(kernel.case, finite)
    inputs = [finite]
    if kernel.spoil is not None:
        inputs.append({**finite, kernel.spoil: finite[kernel.spoil].clone()})
        inputs[1][kernel.spoil][..., -1, :] = math.nan
    clean = [results(device, kernel, tensors, upstream) for tensors in inputs]
    assert kernel.spoil is None or (clean[0][1] == 0 and clean[1][1] > 0)
    (name,) = {name for name, _ in device.launches if kernel.name in name}
    text = device.text_of(name)
    pattern, becomes = FAULTS[fault]
    places = [found.span() for found in re.finditer(pattern, text)]
    assert len(places) == kernel.counts[list(FAULTS).index(fault)]

    def caught(begin: int, end: int) -> bool:
        altered = text[:begin] + re.sub(pattern, becomes, text[begin:end]) + text[end:]
        device.altered[name] = parse(altered)
        try:
            return not all(
                same(results(device, kernel, tensors, upstream), wanted)
                for tensors, wanted in zip(inputs, clean, strict=True)
            )
        except PtxError:
            return True

    try:
        missed = {number for number, place in enumerate(places) if not caught(*place)}
    finally:
        device.altered.clear()
    assert missed == HARMLESS.get((which, fault), set())
