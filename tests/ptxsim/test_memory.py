"""Loads, stores, atomics and cp.async: values, and every fault that must not pass."""

import numpy as np
import pytest

from . import Deadlock, In, LaunchError, MemoryFault, Out, RaceFault, Struct, run_ptx
from .harness import HEADER, run

RNG = np.random.default_rng()
AT0 = "mad.lo.u64 %at0, %wide, 4, %ptr0;"
SHARED = "mov.u32 %r20, sm; mad.lo.u32 %r21, %tid, 4, %r20; xor.b32 %r22, %tid, 32; mad.lo.u32 %r22, %r22, 4, %r20;"


def test_every_width_and_extension():
    data = RNG.integers(0, 256, 64).astype(np.uint8)
    out = np.zeros((8, 6), np.int64)
    body = """
        mad.lo.u64 %at0, %wide, 8, %ptr0; mad.lo.u64 %at1, %wide, 48, %ptr1;
        ld.global.u8 %d1, [%at0]; ld.global.s8 %d2, [%at0+1]; ld.global.u16 %d3, [%at0+2];
        ld.global.s16 %d4, [%at0+2]; ld.global.s32 %d5, [%at0+4]; ld.global.u64 %d6, [%at0];
        st.global.b64 [%at1], %d1; st.global.v2.b64 [%at1+16], {%d3, %d4}; st.global.b64 [%at1+8], %d2;
        st.global.v2.b64 [%at1+32], {%d5, %d6};"""
    run(body, In(data), Out(out), threads=8)
    rows = data.reshape(8, 8)
    np.testing.assert_array_equal(out[:, 0], rows[:, 0])
    np.testing.assert_array_equal(out[:, 1], rows[:, 1].view(np.int8))
    np.testing.assert_array_equal(out[:, 2], rows[:, 2:4].copy().view(np.uint16)[:, 0])
    np.testing.assert_array_equal(out[:, 3], rows[:, 2:4].copy().view(np.int16)[:, 0])
    np.testing.assert_array_equal(out[:, 4], rows[:, 4:].copy().view(np.int32)[:, 0])
    np.testing.assert_array_equal(out[:, 5], rows.copy().view(np.int64)[:, 0])


@pytest.mark.parametrize("offset", [-4, 4 * 32])
def test_out_of_bounds_by_one(offset):
    x = np.zeros(32, np.float32)
    with pytest.raises(
        MemoryFault, match=r"out of bounds: 4 bytes at address 0x\w+, \d+ bytes outside buffer 'p0'"
    ):
        run(f"ld.global.u32 %r1, [%ptr0+{offset}];", x)
    with pytest.raises(MemoryFault, match="out of bounds"):
        run(f"st.global.u32 [%ptr0+{offset}], %tid;", x)


def test_holes_of_a_strided_view_are_out_of_bounds():
    base = np.zeros((4, 8), np.float32)
    view = base[:, :6]
    run("ld.global.u32 %r1, [%ptr0+20];", view)
    with pytest.raises(MemoryFault, match="out of bounds"):
        run("ld.global.u32 %r1, [%ptr0+24];", view)
    run("mov.u32 %r1, 0x3F800000; st.global.u32 [%ptr0+32], %r1;", view, threads=1)
    assert base[1, 0] == 1


def test_negative_strides():
    base = np.arange(8, dtype=np.int32)
    run("ld.global.u32 %r1, [%ptr0]; st.global.u32 [%ptr0+-28], %r1;", base[::-1], threads=1)
    assert base.tolist() == [7, 1, 2, 3, 4, 5, 6, 7]


def test_modes_of_arguments():
    with pytest.raises(MemoryFault, match="read-only"):
        run(f"{AT0} st.global.u32 [%at0], %tid;", In(np.zeros(32, np.int32)))
    with pytest.raises(MemoryFault, match="never written"):
        run(f"{AT0} ld.global.u32 %r1, [%at0];", Out(np.zeros(32, np.int32)))
    out = np.zeros(32, np.float32)
    run(f"{AT0} setp.lt.u32 %p1, %tid, 7; @%p1 st.global.u32 [%at0], %tid;", Out(out))
    assert np.isnan(out[7:]).all()
    assert not np.isnan(out[:7]).any()


def test_memory_given_twice_is_one_buffer():
    x = np.zeros(32, np.uint32)
    half = x[:16]
    body = f"{AT0} mad.lo.u64 %at1, %wide, 4, %ptr1; mov.u32 %r1, 7; st.global.u32 [%at0], %r1; bar.sync 0;"
    body += " ld.global.u32 %r2, [%at1]; add.u32 %r2, %r2, 1; st.global.u32 [%at1], %r2;"
    run(body, x, x)
    assert (x == 8).all()
    x[:] = 0
    run(body, half, x[16:], threads=16)
    assert half.tolist() + x[16:].tolist() == [7] * 16 + [1] * 16


def test_nothing_is_written_back_after_a_fault():
    x = np.zeros(32, np.int32)
    with pytest.raises(MemoryFault):
        run(f"{AT0} st.global.u32 [%at0], %tid; st.global.u32 [%at0+4], %tid;", x)
    assert not x.any()


def test_misaligned_vectors():
    x = np.zeros(64, np.int32)
    with pytest.raises(MemoryFault, match="multiple of 16"):
        run("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%ptr0+8];", x)
    with pytest.raises(MemoryFault, match="shared memory, misaligned"):
        run("mov.u32 %r20, sm; st.shared.v2.b32 [%r20+4], {%r1, %r2};", shared=64)


def test_pointers_of_another_space_hit_nothing():
    with pytest.raises(MemoryFault, match="out of bounds"):
        run("mov.u32 %r20, sm; cvt.u64.u32 %d1, %r20; ld.global.u32 %r1, [%d1];", np.zeros(4), shared=64)
    with pytest.raises(MemoryFault, match="out of bounds"):
        run("and.b64 %d1, %ptr0, 0xFFFFFFFF; ld.global.u32 %r1, [%d1];", np.zeros(4))


def test_generic_addresses_reach_shared_global_and_local():
    out = np.zeros(32, np.uint32)
    body = f"""
        .local .align 8 .b8 stack[8];
        mov.u32 %r20, sm; cvt.u64.u32 %d1, %r20; cvta.shared.u64 %d1, %d1; mad.lo.u64 %d1, %wide, 4, %d1;
        mov.u64 %d3, stack; cvta.local.u64 %d3, %d3;
        st.u32 [%d1], %tid; st.u32 [%d3+4], %tid; ld.local.u32 %r3, [stack+4];
        {AT0} setp.lt.u32 %p1, %tid, 16; selp.b64 %d2, %d1, %d3, %p1; @!%p1 add.u64 %d2, %d2, 4;
        ld.u32 %r1, [%d2]; add.u32 %r1, %r1, %r3; cvta.global.u64 %d4, %at0; st.u32 [%d4], %r1;"""
    run(body, Out(out), shared=128)
    assert out.tolist() == [2 * t for t in range(32)]


def test_shared_memory_starts_unwritten():
    with pytest.raises(MemoryFault, match="read of bytes never written"):
        run(f"{SHARED} ld.shared.u32 %r1, [%r21];", shared=128)
    run(f"{SHARED} ld.shared.u32 %r1, [%r21];", shared=128, check_uninitialised=False)


def test_shared_bounds():
    with pytest.raises(MemoryFault, match="the block has 100 bytes"):
        run(f"{SHARED} st.shared.u32 [%r21], %tid;", shared=100)


EXCHANGE = f"{SHARED} st.shared.u32 [%r21], %tid; BARRIER ld.shared.u32 %r1, [%r22]; {AT0} st.global.u32 [%at0], %r1;"


def test_exchange_between_warps_needs_a_barrier():
    out = np.zeros(64, np.uint32)
    run(EXCHANGE.replace("BARRIER", "bar.sync 0;"), Out(out), threads=64, shared=256)
    assert out.tolist() == [t ^ 32 for t in range(64)]
    with pytest.raises(RaceFault, match=r"written by warp 1 .*st.shared.u32"):
        run(EXCHANGE.replace("BARRIER", ""), Out(out), threads=64, shared=256)
    with pytest.raises(RaceFault):
        run(EXCHANGE.replace("BARRIER", "bar.warp.sync -1;"), Out(out), threads=64, shared=256)
    run(EXCHANGE.replace("BARRIER", ""), Out(out), threads=64, shared=256, detect_races=False)


def test_write_after_read_needs_a_barrier():
    code = EXCHANGE.replace("BARRIER", "bar.sync 0;") + "AGAIN st.shared.u32 [%r21], %r1;"
    run(code.replace("AGAIN", "bar.sync 0;"), Out(np.zeros(64, np.uint32)), threads=64, shared=256)
    with pytest.raises(RaceFault, match="has read with no barrier between"):
        run(code.replace("AGAIN", ""), Out(np.zeros(64, np.uint32)), threads=64, shared=256)


def test_write_after_write():
    code = "mov.u32 %r20, sm; st.shared.u32 [%r20], VALUE;"
    run(code.replace("VALUE", "5"), threads=64, shared=4)  # the same value: harmless
    with pytest.raises(RaceFault, match="different values"):
        run("mov.u32 %r20, sm; shr.u32 %r1, %tid, 5; st.shared.u32 [%r20], %r1;", threads=64, shared=4)
    run("mov.u32 %r20, sm; st.shared.u32 [%r20], %tid;", threads=32, shared=4)  # one warp: in order


def test_half_words_of_one_word_are_no_race():
    body = (
        "mov.u32 %r20, sm; mad.lo.u32 %r21, %tid, 2, %r20; cvt.u16.u32 %h1, %tid; st.shared.b16 [%r21], %h1;"
    )
    order = "shr.u32 %r1, %tid, 5; and.b32 %r2, %tid, 31; mad.lo.u32 %r3, %r2, 2, %r1; mad.lo.u32 %r21, %r3, 2, %r20;"
    run(body.replace("cvt.u16", order + "cvt.u16"), threads=64, shared=128)


NAMED = f"""{SHARED} setp.lt.u32 %p1, %tid, 32; @%p1 bra CONSUME;
    st.shared.u32 [%r21], %tid; PRODUCED bra END;
    CONSUME: WAIT ld.shared.u32 %r1, [%r22];
    END:"""


def test_named_barriers_order_those_who_take_part():
    run(
        NAMED.replace("PRODUCED", "bar.arrive 3, 64;").replace("WAIT", "bar.sync 3, 64;"),
        threads=64,
        shared=256,
    )
    with pytest.raises((RaceFault, MemoryFault)):
        run(NAMED.replace("PRODUCED", "").replace("WAIT", ""), threads=64, shared=256)
    with pytest.raises(Deadlock, match="32 threads wait at a barrier"):
        run(
            NAMED.replace("PRODUCED", "bar.arrive 2, 64;").replace("WAIT", "bar.sync 3, 64;"),
            threads=64,
            shared=256,
        )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("setp.lt.u32 %p1, %tid, 32; @%p1 bar.arrive 3, 64;", "left with 32 arrivals that nobody waited for"),
        ("bar.arrive 3, 64;", "completes by arrivals alone"),
        ("setp.lt.u32 %p1, %tid, 32; @%p1 bar.arrive 3, 32;", "completes by arrivals alone"),
    ],
)
def test_arrivals_that_nobody_waits_for(body, message):
    with pytest.raises(RaceFault, match=message):
        run(body, threads=64)


def test_named_barrier_does_not_order_third_parties():
    body = f"""{SHARED} shr.u32 %r5, %tid, 5; setp.eq.u32 %p1, %r5, 0; setp.eq.u32 %p2, %r5, 1;
        @%p1 st.shared.u32 [%r20], 1;
        @%p2 bra SKIP; bar.sync 1, 64; SKIP: @%p2 bra READ; bra END;
        READ: ld.shared.u32 %r1, [%r20]; END:"""
    with pytest.raises((RaceFault, MemoryFault)):
        run(body, threads=96, shared=512)


def test_barrier_that_never_completes():
    with pytest.raises(Deadlock, match="32 threads wait at a barrier"):
        run("setp.lt.u32 %p1, %tid, 32; @%p1 bra A; B: bar.sync 1, 64; A:", threads=64)


def test_barrier_reductions():
    out = np.zeros((64, 3), np.uint32)
    body = """setp.lt.u32 %p1, %tid, 40; bar.red.popc.u32 %r1, 0, %p1; bar.red.and.pred %p2, 0, %p1;
        bar.red.or.pred %p3, 0, %p1; selp.b32 %r2, 1, 0, %p2; selp.b32 %r3, 1, 0, %p3;
        mad.lo.u64 %at0, %wide, 12, %ptr0;
        st.global.u32 [%at0], %r1; st.global.u32 [%at0+4], %r2; st.global.u32 [%at0+8], %r3;"""
    run(body, Out(out), threads=64)
    assert (out == [40, 0, 1]).all()


COPY = f"""{SHARED} mad.lo.u64 %at0, %wide, 16, %ptr0; mad.lo.u32 %r23, %tid, 16, %r20; add.u32 %r24, %r23, 512;
    cp.async.cg.shared.global [%r23], [%at0], 16; cp.async.commit_group;
    cp.async.cg.shared.global [%r24], [%at0], 16, SIZE; cp.async.commit_group;
    WAIT ld.shared.v4.b32 {{%r1, %r2, %r3, %r4}}, [%r23]; SECOND
    mad.lo.u64 %at1, %wide, 16, %ptr1; st.global.v4.b32 [%at1], {{%r1, %r2, %r3, %r4}};"""


def copy(wait, size="16", second="", **options):
    x, out = RNG.integers(0, 99, 128).astype(np.int32), np.zeros(128, np.int32)
    run(
        COPY.replace("WAIT", wait).replace("SIZE", size).replace("SECOND", second),
        In(x),
        Out(out),
        shared=1024,
        **options,
    )
    return x, out


def test_cp_async_lands_at_its_wait():
    x, out = copy("cp.async.wait_group 1;")
    np.testing.assert_array_equal(x, out)
    for wait in ("", "cp.async.wait_group 2;"):
        with pytest.raises(RaceFault, match="has not been waited for"):
            copy(wait)
    with pytest.raises(RaceFault, match="has not been waited for"):
        copy("cp.async.wait_group 1;", second="ld.shared.u32 %r9, [%r24];")
    copy("cp.async.wait_all;", second="ld.shared.u32 %r9, [%r24];")


def test_cp_async_fills_with_zeros_and_reads_nothing_beyond():
    second = "ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r24];"
    x, out = copy("cp.async.wait_group 0;", "8", second)
    np.testing.assert_array_equal(out.reshape(-1, 4)[:, :2], x.reshape(-1, 4)[:, :2])
    assert not out.reshape(-1, 4)[:, 2:].any()
    body = "mov.u32 %r20, sm; mov.u32 %r1, SIZE; cp.async.ca.shared.global [%r20], [%ptr0+64], 4, %r1;"
    run(body.replace("SIZE", "0"), In(np.zeros(16, np.int32)), threads=1, shared=16)
    with pytest.raises(MemoryFault, match="out of bounds"):
        run(body.replace("SIZE", "4"), In(np.zeros(16, np.int32)), threads=1, shared=16)


def test_cp_async_of_one_warp_is_not_visible_to_another_without_a_barrier():
    body = f"""{SHARED} {AT0} cp.async.ca.shared.global [%r21], [%at0], 4; cp.async.wait_all; BARRIER
        ld.shared.u32 %r1, [%r22];"""
    run(body.replace("BARRIER", "bar.sync 0;"), In(np.zeros(64, np.int32)), threads=64, shared=256)
    with pytest.raises(RaceFault, match="no barrier between"):
        run(body.replace("BARRIER", ""), In(np.zeros(64, np.int32)), threads=64, shared=256)


def test_atomics_with_collisions():
    counters = np.zeros(4, np.uint32)
    old = np.zeros(64, np.uint32)
    body = """and.b32 %r1, %tid, 3; mad.wide.u32 %at0, %r1, 4, %ptr0; atom.global.add.u32 %r2, [%at0], 1;
        mad.lo.u64 %at1, %wide, 4, %ptr1; st.global.u32 [%at1], %r2;"""
    run(body, counters, Out(old), threads=64)
    assert counters.tolist() == [16] * 4
    for c in range(4):
        assert sorted(old[c::4].tolist()) == list(range(16))


@pytest.mark.parametrize(
    ("op", "want"),
    [("min.s32", -3), ("max.s32", 28), ("exch.b32", 28), ("or.b32", -1), ("inc.u32", 0), ("and.b32", 0)],
)
def test_atomic_operations(op, want):
    x = np.array([0 if op in ("min.s32", "max.s32", "or.b32") else 5], np.int32)
    run(f"sub.u32 %r1, %tid, 3; atom.global.{op} %r2, [%ptr0], %r1;", x)
    if op == "inc.u32":
        assert 0 <= x[0] <= 35
    else:
        assert x[0] == want


def test_float_atomics_scalar_vector_and_packed():
    x = np.zeros(8, np.float32)
    body = """cvt.rn.f32.u32 %f1, %tid; red.global.add.f32 [%ptr0], %f1;
        atom.global.gpu.acq_rel.add.v4.f32 {%f2, %f3, %f4, %f5}, [%ptr0+16], {%f1, %f1, %f1, %f1};"""
    run(body, x)
    assert x.tolist() == [496, 0, 0, 0, 496, 496, 496, 496]
    h = np.zeros(2, np.float16)
    run("mov.b32 %r1, 0x40003C00; red.global.add.noftz.f16x2 [%ptr0], %r1;", h)
    assert h.tolist() == [32, 64]


def test_atomic_into_unwritten_output_is_a_fault():
    with pytest.raises(MemoryFault, match="never written"):
        run("red.global.add.f32 [%ptr0], 0f3F800000;", Out(np.zeros(1, np.float32)))


def test_launch_arguments():
    text = (
        HEADER
        + """.visible .entry k(.param .align 8 .b8 s[32], .param .u32 n, .param .f32 f, .param .u64 q) {
        .reg .b32 %r<8>; .reg .b64 %d<8>;
        mov.b64 %d1, s; ld.param.u64 %d2, [%d1+8]; ld.param.u32 %r1, [s+4]; ld.param.u32 %r2, [n]; ld.param.b32 %r3, [f];
        st.global.u32 [%d2], %r1; st.global.u32 [%d2+4], %r2; st.global.b32 [%d2+8], %r3; ret; }"""
    )
    out = np.zeros(3, np.uint32)
    run_ptx(text, grid=1, block=1, args=[Struct(("b", 1), ("i", -2), (None, out), ("d", 0.5)), 7, 1.0, None])
    assert out.tolist() == [2**32 - 2, 7, 0x3F800000]
    for args, message in (
        ([], "4 parameters"),
        ([bytes(31), 1, 1.0, None], "32 bytes"),
        ([bytes(32), 2**32, 1.0, None], "can't take"),
    ):
        with pytest.raises(LaunchError, match=message):
            run_ptx(text, grid=1, block=1, args=args)
    with pytest.raises(LaunchError, match=r"no \.reqntid"):
        run_ptx(text, grid=1, args=[bytes(32), 1, 1.0, None])


def test_grid_indices_over_several_groups():
    out = np.zeros((2, 3, 5), np.uint32)
    body = """mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z; mov.u32 %r4, %nctaid.x; mov.u32 %r5, %nctaid.y;
        mad.lo.u32 %r6, %r3, %r5, %r2; mad.lo.u32 %r6, %r6, %r4, %r1; mad.wide.u32 %at0, %r6, 4, %ptr0;
        mad.lo.u32 %r7, %r3, 100, %r1; mad.lo.u32 %r7, %r2, 10, %r7; setp.eq.u32 %p1, %tid, 0; @%p1 st.global.u32 [%at0], %r7;"""
    for threads in (32, 96, 4096):
        run(body, Out(out), grid=(5, 3, 2), group_threads=threads)
        assert out.tolist() == [
            [[100 * z + 10 * y + x for x in range(5)] for y in range(3)] for z in range(2)
        ]


def test_statistics():
    x = np.zeros(32 * 32, np.int32)
    body = """mov.u32 %r20, sm; mad.lo.u32 %r21, %tid, STRIDE, %r20; st.shared.u32 [%r21], %tid;
        mad.lo.u64 %at0, %wide, STRIDE, %ptr0; ld.global.u32 %r1, [%at0];"""
    for stride, ways, sectors in ((4, 1, 4), (8, 2, 8), (128, 32, 32)):
        report = run(body.replace("STRIDE", str(stride)), x, shared=4096, statistics=True)
        assert sum(report.bank_conflicts().values()) == ways - 1
        assert list(report.global_sectors().values()) == [(sectors, 4, 1)]
    assert report.count("st.shared") == 1
    assert report.by_class()["shared store"] == 1
    wide = "mov.u32 %r20, sm; mad.lo.u32 %r21, %tid, 16, %r20; st.shared.v4.b32 [%r21], {%r1, %r2, %r3, %r4};"
    assert run(wide, shared=512, statistics=True).bank_conflicts() == {}
