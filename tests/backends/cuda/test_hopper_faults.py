"""Waits, arrivals, barriers and fences of the sm_90a kernels, left out or changed: a run must fail.

The runs go everywhere: masked and unmasked steps, stages used again, tails of packed sequences and, where a
value is NaN, the careful second pass. `missed` says where nothing was to be noticed, and why.
"""

from __future__ import annotations

import pytest
import torch
from faults import Fault, Kernel, Run, plant, record
from oracle import Case

WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 complete, (\[%r\d+\]), (%r\d+);\n@!complete bra again;"
FLIPPED = (
    r".reg .b32 flipped;\nagain:\nxor.b32 flipped, \2, 1;\n"
    r"mbarrier.try_wait.parity.shared::cta.b64 complete, \1, flipped;\n@!complete bra again;"
)
EXPECT = r"(mbarrier\.arrive\.expect_tx\.\S+ _, \[%r\d+\]), %r\d+;"
NO_TURNS = ("an arrival at a barrier left out",)  # only forward's warpgroups take turns
FENCE = "a fence of registers left out"
FAULTS = {
    "a wait left out": Fault(WAIT),
    "a wait for the wrong phase": Fault(f"again:\n{WAIT}", FLIPPED),
    "an arrival left out": Fault(r"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+\];"),
    "too many bytes expected": Fault(EXPECT, r"\1, 262144;"),
    "too few bytes expected": Fault(EXPECT, r"\1, 4096;"),
    "one product more in flight": Fault(r"(wgmma\.wait_group\.sync\.aligned) 0;", r"\1 1;"),
    "two products in flight": Fault(r"(wgmma\.wait_group\.sync\.aligned) 1;", r"\1 2;"),
    "a proxy fence left out": Fault(r"fence\.proxy\.async\.shared::cta;"),
    "a barrier left out": Fault(r"bar\.sync[ \t]+[^;]*;"),
    "an arrival at a barrier left out": Fault(r"bar\.arrive[ \t]+[^;]*;"),
    FENCE: Fault(r"wgmma\.fence\.sync\.aligned;"),
    "the fence of new mbarriers left out": Fault(r"fence\.mbarrier_init\.release\.cluster;"),
    "fewer registers given back": Fault(r"(setmaxnreg\.dec\.sync\.aligned\.u32) 24;", r"\1 32;"),
    "more registers taken": Fault(r"(setmaxnreg\.inc\.sync\.aligned\.u32) 240;", r"\1 248;"),
}


def kernels(dim: int) -> dict[str, Kernel]:
    base = {
        "dtype": torch.float16, "kv_heads": 1, "head_dim": dim, "head_dim_v": dim, "options": {"causal": True}
    }  # fmt: skip
    long = {**base, "lengths": ((128, 450),)}
    packed = Case(**base, lengths=((300, 300), (3, 3)), packed=True, wanted=("k", "v"))
    forward, dq = Case(**long, wanted=()), Case(**long, wanted=("q",))
    # Of fences of registers, one is missed if another stands between it and the last access to these. They
    # stay: before a product that has none, ptxas puts one in itself (advisory C7519).
    found = {
        "forward": Kernel("sm907forward", (Run(forward), Run(forward, "v")), (), {FENCE: 3}),
        "dq": Kernel("sm9014query_gradient", (Run(dq), Run(dq, "k")), NO_TURNS, {FENCE: 5}),
    }
    if dim <= 128:
        return {**found, "dk and dv": key_gradient("Lb1ELb1E", packed)}
    return {**found, "dk": key_gradient("Lb1ELb0E", packed), "dv": key_gradient("Lb0ELb1E", packed)}


def key_gradient(wanted: str, case: Case) -> Kernel:
    return Kernel(f"sm9012key_gradient\\w+{wanted}", (Run(case),), NO_TURNS, {FENCE: 1})


KERNELS = {dim: kernels(dim) for dim in (64, 128, 256)}
QUICK = {
    ("forward", "a proxy fence left out"),
    ("forward", "the fence of new mbarriers left out"),
    ("forward", "more registers taken"),
}
recordings = {}


@pytest.mark.parametrize(
    ("dim", "which", "fault"),
    [
        pytest.param(
            dim, which, fault, marks=() if dim == 64 and (which, fault) in QUICK else pytest.mark.slow
        )
        for dim in KERNELS
        for which in KERNELS[dim]
        for fault in FAULTS
    ],
)
def test_planted_faults_are_noticed(simulate, monkeypatch, dim, which, fault):
    kernel = KERNELS[dim][which]
    if (dim, which) not in recordings:
        device = simulate(str(dim), "f16", "plain", 90)
        recordings[dim, which] = record(device, kernel.name, kernel.runs, monkeypatch)
    kernel.hold(fault, *plant(recordings[dim, which], FAULTS[fault]))
