"""mbarriers, bulk copies and tensor copies: what arrives, and what happens to those who don't wait."""

import re

import numpy as np
import pytest

from . import (
    Deadlock,
    In,
    LaunchError,
    Out,
    PtxError,
    RaceFault,
    TensorMap,
    launch_triton,
    run_ptx,
    run_triton,
    why_no_triton,
)
from .harness import HEADER, run
from .test_matrix import swizzled

RNG = np.random.default_rng()

# Thread 0 starts a 512-byte bulk copy of p0; everybody waits for it and stores what it got to p1.
BULK = """
    mov.u32 %r20, sm; add.u32 %r21, %r20, 1024; setp.eq.u32 %p1, %tid, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r21], 1; INIT
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r21], BYTES;
    @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r20], [%ptr0], 512, [%r21];
    WAIT
    mad.lo.u32 %r22, %tid, 4, %r20; ld.shared.u32 %r1, [%r22]; mad.lo.u64 %at0, %wide, 4, %ptr1; st.global.u32 [%at0], %r1;
    LAST"""
LOOP = "L: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r21], 0; @!%p2 bra L;"


def bulk(init="bar.sync 0;", wait=LOOP, size="512", last=""):
    x, out = RNG.integers(0, 2**31, 128).astype(np.uint32), np.zeros(128, np.uint32)
    body = BULK.replace("INIT", init).replace("WAIT", wait).replace("BYTES", size).replace("LAST", last)
    run(body, In(x), Out(out), shared=1040, threads=128, max_steps=100_000)
    np.testing.assert_array_equal(out, x)


def test_bulk_copy():
    bulk()
    bulk(wait=LOOP.replace("try_wait", "test_wait"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(wait=""), RaceFault, "has not been waited for"),
        (dict(wait="@%p1 bra L; bra SKIP; " + LOOP + " SKIP:"), PtxError, "copy of line|waited for the mbarrier|wait"),
        (dict(size="516"), Deadlock, "for an mbarrier phase"),
        (dict(init=""), PtxError, "no mbarrier is initialised|no barrier between|never written"),
        (dict(wait=LOOP + "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r21]; @%p1 mbarrier.arrive.shared::cta.b64 _, [%r21], 2;"),
         PtxError, "more arrivals"),
        (dict(last="setp.eq.u32 %p3, %tid, 64; @%p3 st.shared.u32 [%r20], %r1;"), RaceFault, "has read with no barrier"),
    ],
)  # fmt: skip
def test_bulk_faults(change, error, message):
    with pytest.raises(error, match=message):
        bulk(**change)


def tensor_kernel(rank, threads, elements):
    """Copies a box at coordinates p2[0..rank) to shared memory, then the raw bytes to p1 and the box to map o."""
    coords = "{" + ", ".join(f"%r{i}" for i in range(rank)) + "}"
    loads = "".join(f"ld.global.u32 %r{i}, [%ptr2+{4 * i}];" for i in range(rank))
    return (
        HEADER
        + f"""
    .visible .entry k(.param .align 64 .b8 m[128], .param .u64 p1, .param .u64 p2, .param .align 64 .b8 o[128])
    .reqntid {threads}
    {{
    .reg .pred %p<8>; .reg .b32 %r<32>; .reg .b64 %ptr<8>; .reg .b64 %d<8>; .reg .b32 %tid;
    .shared .align 1024 .b8 sm[{elements * 2}]; .shared .align 8 .b8 bar[8];
    ld.param.u64 %ptr1, [p1]; ld.param.u64 %ptr2, [p2]; mov.b64 %d1, m; cvta.param.u64 %d1, %d1;
    mov.b64 %d2, o; cvta.param.u64 %d2, %d2; mov.u32 %tid, %tid.x; {loads}
    mov.u32 %r20, sm; mov.u32 %r21, bar; setp.eq.u32 %p1, %tid, 0;
    @%p1 mbarrier.init.shared::cta.b64 [%r21], 1; bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r21], {elements * 2};
    @%p1 cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r20], [%d1, {coords}], [%r21];
    {LOOP}
    @%p1 cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group [%d2, {coords}], [%r20];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;
    mad.lo.u32 %r23, %tid, 4, %r20; ld.shared.u32 %r24, [%r23]; mad.wide.u32 %d3, %tid, 4, %ptr1; st.global.u32 [%d3], %r24;
    ret;
    }}"""
    )


@pytest.mark.parametrize("width", [0, 32, 64, 128])
@pytest.mark.parametrize("start", [(0, 0), (5, 8), (-3, 40)])
def test_tensor_copy_swizzles_and_fills(width, start):
    rows, columns = 16, (width or 64) // 2
    x = RNG.standard_normal((20, 56)).astype(np.float16)
    raw, back = np.zeros(rows * columns, np.uint16), np.zeros_like(x)
    text = tensor_kernel(2, rows * columns // 2, rows * columns)
    coordinates = np.array(start[::-1], np.int32)
    run_ptx(
        text,
        grid=1,
        args=[
            TensorMap(x, (rows, columns), width),
            Out(raw),
            In(coordinates),
            TensorMap(back, (rows, columns), width),
        ],
    )
    want_back = np.zeros_like(x)
    for r in range(rows):
        for c in range(columns):
            i, j = r + start[0], c + start[1]
            inside = 0 <= i < 20 and 0 <= j < 56
            at = swizzled((r * columns + c) * 2, width or 16) // 2
            assert raw[at] == (x[i, j].view(np.uint16) if inside else 0)
            if inside:
                want_back[i, j] = x[i, j]
    np.testing.assert_array_equal(back, want_back)


def test_three_dimensions():
    x = RNG.standard_normal((3, 10, 16)).astype(np.float16)
    raw, back = np.zeros(2 * 4 * 8, np.float16), np.zeros_like(x)
    text = tensor_kernel(3, 32, 64)
    maps = [TensorMap(a, (2, 4, 8)) for a in (x, back)]
    run_ptx(text, grid=1, args=[maps[0], Out(raw), In(np.array([8, 3, 1], np.int32)), maps[1]])
    np.testing.assert_array_equal(raw.reshape(2, 4, 8), x[1:3, 3:7, 8:])


def test_maps_that_hardware_would_refuse():
    for make, message in (
        (lambda: TensorMap(np.zeros((4, 5), np.float16), (4, 8)), "strides"),
        (lambda: TensorMap(np.zeros((4, 64), np.float16), (4, 64), 64), "at most the swizzle"),
        (lambda: TensorMap(np.zeros((4, 64), np.float16), (4,)), "axes"),
    ):
        with pytest.raises(LaunchError, match=message):
            make().encode(0)


@pytest.mark.skipif(bool(why_no_triton()), reason=str(why_no_triton()))
def test_triton_descriptors():
    from . import triton_kernels as kernels

    x = RNG.standard_normal((70, 136)).astype(np.float16)
    y = np.zeros_like(x)
    args = dict(x_ptr=In(x), y_ptr=Out(y), M=70, N=136)
    report, compiled = run_triton(
        kernels.copy_by_descriptor, args, grid=(3, 3), arch=90, constexprs=dict(BM=32, BN=64)
    )
    assert report.count("cp.async.bulk.tensor") > 0
    np.testing.assert_array_equal(y, x + np.float16(1))
    ptx = compiled.asm["ptx"]
    with pytest.raises(RaceFault, match=r"no fence\.proxy\.async"):
        launch_triton(compiled, args, grid=(3, 3), ptx=ptx.replace("fence.proxy.async.shared::cta;", ";"))
    unwaited = re.sub(r"mbarrier\.try_wait[^;]*;", "mov.pred complete, 1;", ptx)
    with pytest.raises(RaceFault, match="has not been waited for"):
        launch_triton(compiled, args, grid=(3, 3), ptx=unwaited)
