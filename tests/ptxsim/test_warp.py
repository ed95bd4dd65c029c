"""Shuffles, votes and matches lane by lane; divergence, reconvergence and waiting."""

import numpy as np
import pytest

from . import Deadlock, Out, Timeout
from .harness import elementwise, run

RNG = np.random.default_rng()


def shuffle(values, b, c, mode):
    """The ISA's pseudocode for one warp."""
    out, valid = [], []
    for lane in range(32):
        segment, clamp, amount = c >> 8 & 31, c & 31, b & 31
        most, least = (lane & segment) | (clamp & ~segment & 31), lane & segment
        if mode == "up":
            j, ok = lane - amount, lane - amount >= most
        elif mode == "down":
            j, ok = lane + amount, lane + amount <= most
        elif mode == "bfly":
            j, ok = lane ^ amount, lane ^ amount <= most
        else:
            j = least | (amount & ~segment & 31)
            ok = j <= most
        out.append(values[j if ok else lane])
        valid.append(ok)
    return out, valid


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(mode):
    for c in (0 if mode == "up" else 31, 0x181F, 0x1C07 if mode != "up" else 0x1800):
        for b in (0, 1, 5, 16, 31):
            x = RNG.integers(0, 2**31, 64).astype(np.uint32)
            code = f"shfl.sync.{mode}.b32 %r1|%p1, %1, {b}, {c}, -1; selp.b32 %r2, 0x80000000, 0, %p1; or.b32 %0, %r1, %r2;"
            got = elementwise(code, np.uint32, x)
            for warp in range(2):
                half = slice(32 * warp, 32 * warp + 32)
                want, valid = shuffle(x[half].tolist(), b, c, mode)
                assert (got[half] & 0x7FFFFFFF).tolist() == want
                assert (got[half] >> 31).astype(bool).tolist() == valid


def test_votes_and_match():
    x = RNG.integers(0, 4, 64).astype(np.uint32)
    ballot = elementwise("setp.eq.u32 %p1, %1, 2; vote.sync.ballot.b32 %0, %p1, -1;", np.uint32, x)
    match = elementwise("match.any.sync.b32 %0, %1, -1;", np.uint32, x)
    some = elementwise(
        "setp.eq.u32 %p1, %1, 9; vote.sync.any.pred %p2, %p1, -1; selp.b32 %0, 1, 0, %p2;", np.uint32, x
    )
    for lane in range(64):
        warp = x[lane // 32 * 32 :][:32]
        assert ballot[lane] == sum(1 << i for i in range(32) if warp[i] == 2)
        assert match[lane] == sum(1 << i for i in range(32) if warp[i] == x[lane])
    assert not some.any()
    total = elementwise("redux.sync.add.u32 %0, %1, -1;", np.uint32, x)
    assert total.tolist() == np.repeat(x.reshape(2, 32).sum(1), 32).tolist()


def test_elect():
    """One lane of those in the mask, the same that all of them learn of."""
    x = np.zeros(64, np.uint32)
    code = "elect.sync %r1|%p1, MASK; selp.b32 %r2, 0x100, 0, %p1; or.b32 %0, %r1, %r2;"
    for mask in (0xFFFFFFFF, 0xF0F0):
        found = elementwise(code.replace("MASK", f"{mask:#x}"), np.uint32, x).reshape(2, 32)
        inside = [lane for lane in range(32) if mask >> lane & 1]
        for warp in found:
            assert (warp >> 8).sum() == 1
            leader = int(np.flatnonzero(warp >> 8)[0])
            assert leader in inside
            assert (warp[inside] & 0xFF == leader).all()


def test_elect_waits_for_its_members():
    """Half the warp comes late; what one thread elected writes is there once. A member that never comes hangs."""
    out = np.zeros(1, np.uint32)
    body = "setp.lt.u32 %p1, %tid, 16; @%p1 bra A; mov.u32 %r1, 7; A: elect.sync _|%p2, -1; @%p2 atom.global.add.u32 %r2, [%ptr0], 1;"
    run(body, out)
    assert out[0] == 1
    with pytest.raises(Deadlock, match="16 threads wait for the rest of its warp"):
        run("setp.lt.u32 %p1, %tid, 16; @%p1 bra A; bar.warp.sync -1; bra END; A: elect.sync _|%p2, -1; END:")


def test_divergent_loops_reconverge():
    x = RNG.integers(0, 40, 96).astype(np.uint32)
    code = """
        mov.u32 %r1, 0; mov.u32 %r2, %1;
        LOOP: setp.eq.u32 %p1, %r2, 0; @%p1 bra DONE;
        add.u32 %r1, %r1, %r2; sub.u32 %r2, %r2, 1; bra LOOP;
        DONE: vote.sync.ballot.b32 %r3, 1, -1; setp.ne.u32 %p2, %r3, 0xFFFFFFFF; @%p2 mov.u32 %r1, 0xBAD;
        mov.u32 %0, %r1;"""
    assert elementwise(code.replace("ballot.b32 %r3, 1", "ballot.b32 %r3, %p1"), np.uint32, x).tolist() == [
        v * (v + 1) // 2 for v in x.tolist()
    ]


def test_partial_warps_and_early_exit():
    out = np.zeros(50, np.uint32)
    body = """
        setp.ge.u32 %p1, %tid, 40; @%p1 exit;
        activemask.b32 %r1; popc.b32 %r2, %r1;
        mad.lo.u64 %at0, %wide, 4, %ptr0; st.global.u32 [%at0], %r2;"""
    run(body, out, threads=50)
    assert out.tolist() == [32] * 32 + [8] * 8 + [0] * 10


def test_spin_loop_on_another_warp_makes_progress():
    flag = np.zeros(1, np.uint32)
    out = np.zeros(64, np.uint32)
    body = """
        setp.ge.u32 %p1, %tid, 32; @%p1 bra SET;
        SPIN: ld.relaxed.gpu.global.u32 %r1, [%ptr0]; setp.eq.u32 %p2, %r1, 0; @%p2 bra SPIN;
        bra DONE;
        SET: mov.u32 %r1, 5; st.relaxed.gpu.global.u32 [%ptr0], %r1;
        DONE: mad.lo.u64 %at0, %wide, 4, %ptr1; st.global.u32 [%at0], %r1;"""
    run(body, flag, Out(out), threads=64)
    assert out.tolist() == [5] * 64


def test_lock_between_threads_of_one_warp():
    lock, total = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    body = """
        TRY: atom.global.cas.b32 %r1, [%ptr0], 0, 1; setp.ne.u32 %p1, %r1, 0; @%p1 bra TRY;
        ld.volatile.global.u32 %r2, [%ptr1]; add.u32 %r2, %r2, 1; st.volatile.global.u32 [%ptr1], %r2;
        atom.global.exch.b32 %r3, [%ptr0], 0;"""
    run(body, lock, total)
    assert total[0] == 32


def test_endless_loop_times_out():
    with pytest.raises(Timeout, match="LOOP"):
        run("LOOP: bra LOOP;", max_steps=5000)


def test_warp_instruction_that_half_the_warp_never_reaches():
    body = "setp.lt.u32 %p1, %tid, 16; @%p1 bra A; B: bar.warp.sync -1; bra END; A: vote.sync.ballot.b32 %r1, %p1, -1; END:"
    with pytest.raises(Deadlock, match="16 threads wait for the rest of its warp"):
        run(body)
