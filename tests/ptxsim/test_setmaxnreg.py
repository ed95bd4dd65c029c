"""setmaxnreg: who may change how many registers, and what a block has to give."""

import numpy as np
import pytest

from . import Deadlock, Out, PtxError, UnsupportedInstruction, run_ptx
from .harness import kernel

DEC, INC = "setmaxnreg.dec.sync.aligned.u32", "setmaxnreg.inc.sync.aligned.u32"
# Three warpgroups, as in a kernel whose first one loads: 168 registers a thread, 64512 of them.
GROUPS = "setp.ge.u32 %p1, %tid, 128; @%p1 bra OTHERS; FIRST bra.uni END; OTHERS: REST END:"
STORE = "mad.lo.u64 %at0, %wide, 4, %ptr0; st.global.u32 [%at0], %tid;"


def groups(first, rest, threads=384, directives=""):
    body = GROUPS.replace("FIRST", first).replace("REST", rest) + STORE
    out = np.zeros(threads, np.uint32)
    text = kernel(body, [out], threads=threads).replace(".reqntid", f"{directives} .reqntid")
    run_ptx(text, "k", grid=1, args=[Out(out)])
    assert (out == np.arange(threads)).all()


@pytest.mark.parametrize(
    ("first", "rest", "directives"),
    [
        (f"{DEC} 24;", f"{INC} 240;", ""),
        (f"{DEC} 24;", f"{INC} 232; {INC} 240;", ""),
        (f"{DEC} 168;", f"{INC} 168;", ""),
        # Those who ask run first: they wait.
        (f"{INC} 240;", f"{DEC} 128;", ""),
        (f"{DEC} 24;", f"{INC} 48;", ".maxnreg 40"),
        (f"{DEC} 24;", f"{INC} 104;", ".minnctapersm 2"),
    ],
)
def test_registers_change_hands(first, rest, directives):
    groups(first, rest, directives=directives)


@pytest.mark.parametrize(
    ("first", "rest", "error", "message"),
    [
        (f"{DEC} 20;", "", UnsupportedInstruction, "a multiple of 8 from 24 to 256"),
        (f"{DEC} 16;", "", UnsupportedInstruction, "a multiple of 8 from 24 to 256"),
        ("", f"{INC} 264;", UnsupportedInstruction, "a multiple of 8 from 24 to 256"),
        (f"{DEC} 176;", "", PtxError, "has 168 registers a thread: dec to more, 176"),
        (f"{INC} 160;", "", PtxError, "has 168 registers a thread: inc to fewer, 160"),
        (f"{DEC} 24; {DEC} 32;", "", PtxError, "has 24 registers a thread: dec to more, 32"),
        # More than the block has: they wait for ever.
        ("", f"{INC} 240;", Deadlock, "256 threads wait for registers"),
        (f"{DEC} 24;", f"{INC} 248;", Deadlock, "128 threads wait for registers"),
        (f"{DEC} 32;", f"{INC} 240;", Deadlock, "128 threads wait for registers"),
        # Not the whole warpgroup: some never come, or have gone, or half a warp does.
        (f"setp.ge.u32 %p2, %tid, 32; @%p2 {DEC} 24; @%p2 bar.sync 1, 96;", "", Deadlock, "for the rest of its warp"),
        (f"setp.ge.u32 %p2, %tid, 96; @%p2 exit; {DEC} 24;", "", PtxError, "threads of the warpgroup have exited"),
    ],
)  # fmt: skip
def test_faults(first, rest, error, message):
    with pytest.raises(error, match=message):
        groups(first, rest)


def test_other_launches():
    with pytest.raises(UnsupportedInstruction, match="needs whole warpgroups"):
        groups(f"{DEC} 24;", "", threads=160)
    with pytest.raises(Deadlock, match="128 threads wait for registers"):
        groups(f"{DEC} 24;", f"{INC} 56;", directives=".maxnreg 40")
