"""What the sm_80 kernels must not be without, left out or changed: a run must fail.

Sizes are such that every bound cuts something off: a single tile of 5 rows; several tiles with 5 rows in the
last one; 14, at a head dimension that ends within a chunk of 16 bytes. Where a value is NaN, the careful
second pass runs too. `missed` says where nothing was to be noticed, and why.
"""

from __future__ import annotations

import pytest
import torch
from faults import Fault, Kernel, Run, plant, record
from oracle import Case

# Straight code follows, without a branch or a label, up to:
STRAIGHT = r"(?=(?:(?!\bbra\b|\n\$L)[\s\S])*?"
FAULTS = {
    "a barrier left out": Fault(r"bar\.sync[ \t]+[^;]*;"),
    "one group more in flight": Fault(r"(cp\.async\.wait_group) 0;", r"\1 1;"),
    "two groups in flight": Fault(r"(cp\.async\.wait_group) 1;", r"\1 2;"),
    "rows outside read": Fault(r"(cp\.async\.c[ag]\.shared\.global [^;]*), ignore;", r"\1;", every=4),
    # What leads to a product is whether dk is wanted.
    "rows outside written": Fault(
        r"@!?%p\d+ bra[^;]*;" + STRAIGHT.replace("(?=", "(?!") + r"mma\.sync)" + STRAIGHT + r"ld\.shared\.v4)"
    ),
    "columns outside written": Fault(r"@!?%p\d+ bra[^;]*;" + STRAIGHT + r"st\.global\.\w+[ \t]+\[%rd\d+\])"),
    "fragments swapped": Fault(
        r"(mma\.sync[^{]*\{[^}]*\}, \{)(%r\d+), (%r\d+)(, %r\d+, %r\d+\})", r"\1\3, \2\4", every=32
    ),
}
BASE = {"dtype": torch.float16, "kv_heads": 1, "options": {"causal": True}}


def case(lengths: tuple[int, int], dim: int = 64, **more) -> Case:
    return Case(**{**BASE, "head_dim": dim, "head_dim_v": dim, "lengths": (lengths,), **more})


def runs(several: tuple[int, int], spoil: str | None = None, tails=(2, 6, 10), **more) -> tuple[Run, ...]:
    """`tails`: a warp writes four rows at once; columns beyond the last of these are another row's."""
    one, many, odd = (case(*size, **more) for size in (((5, 5),), (several,), ((78, 142), 33)))
    spoilt = () if spoil is None else (Run(one, spoil), Run(many, spoil))
    return (Run(one), Run(many), Run(odd), *spoilt, *(Run(case((rows, rows), 33, **more)) for rows in tails))


SPLIT = {"group": 2, "wanted": (), "options": {}}
SPLITS = (
    Run(case((1, 1100), mask=0.3, head_dim_v=24, **SPLIT), num_sms=4),
    Run(
        Case(**{**BASE, **SPLIT}, head_dim=64, head_dim_v=64, lengths=((1, 1100), (2, 900)), packed=True),
        num_sms=16,
    ),
)
# A warp of forward owns 32 queries.
FORWARD = (*runs((69, 261), "v", (2, 6, 10, 18, 22, 26, 30), wanted=()), SPLITS[0])
# A block goes through tiles of several sequences and rows, of one head alone.
SUMMED = Run(
    Case(
        **BASE,
        group=2,
        head_dim=64,
        head_dim_v=64,
        lengths=((69, 133),) * 2,
        bias=(False, True, False, True),
        wanted=("bias",),
    )
)
# In the loops over unmasked tiles no row is outside, and columns meet zeros of the other operand.
NO_TAIL = "rows outside read"
KERNELS = {
    "forward": Kernel("8fastattn7forward", FORWARD, missed={
        NO_TAIL: 2,
        # Of a split: four lanes write the same lse, the first column is inside, and three are other queries'.
        "columns outside written": 5,
    }),
    "combine": Kernel("7combineINS_4Half", SPLITS),
    "dk and dv": Kernel(
        "8fastattn12key_gradient", runs((197, 261), wanted=("k", "v")), missed={NO_TAIL: 1}
    ),
    "dq": Kernel("8fastattn14query_gradient", runs((69, 261), "k", wanted=("q",)), missed={NO_TAIL: 1}),
    "score gradient": Kernel(
        "8fastattn14score_gradient",
        (*runs((69, 133), bias=(True, True, True, True), wanted=("bias",)), SUMMED),
    ),
}  # fmt: skip
# These two write otherwise, and by their own hands.
OF_SCORE_GRADIENT = (
    "a barrier left out",
    "one group more in flight",
    "rows outside read",
    "fragments swapped",
)
FAULTS_OF = {
    **dict.fromkeys(KERNELS, FAULTS),
    "combine": {"a bound left out": Fault(r"(setp\.[gl]e\.s(?:32|64)[^;]*;\s*)@%p\d+ bra[^;]*;", r"\1")},
    "score gradient": {
        **{fault: FAULTS[fault] for fault in OF_SCORE_GRADIENT},
        "a bound left out": Fault(r"(or\.pred[^;]*;\s*)@%p\d+ bra[^;]*;", r"\1"),
    },
}
QUICK = {("dk and dv", "a barrier left out"), ("combine", "a bound left out")}
recordings = {}


@pytest.mark.parametrize(
    ("which", "fault"),
    [
        pytest.param(which, fault, marks=() if (which, fault) in QUICK else pytest.mark.slow)
        for which in KERNELS
        for fault in FAULTS_OF[which]
    ],
)
def test_planted_faults_are_noticed(simulate, monkeypatch, which, fault):
    kernel = KERNELS[which]
    if which not in recordings:
        device = simulate("64", "f16", "plain;all" if which == "score gradient" else "plain")
        recordings[which] = record(device, kernel.name, kernel.runs, monkeypatch)
    kernel.hold(fault, *plant(recordings[which], FAULTS_OF[which][fault]))
