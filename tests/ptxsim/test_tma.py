"""mbarriers, bulk copies and tensor copies: what arrives, and what happens to those who don't wait."""

import math
import re

import numpy as np
import pytest
import torch

from . import (
    Deadlock,
    In,
    LaunchError,
    MemoryFault,
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

VISIBLE = "fence.mbarrier_init.release.cluster;"
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


def bulk(init=VISIBLE + "bar.sync 0;", wait=LOOP, size="512", last=""):
    x, out = RNG.integers(0, 2**31, 128).astype(np.uint32), np.zeros(128, np.uint32)
    body = BULK.replace("INIT", init).replace("WAIT", wait).replace("BYTES", size).replace("LAST", last)
    run(body, In(x), Out(out), shared=1040, threads=128, max_steps=100_000)
    np.testing.assert_array_equal(out, x)


def test_bulk_copy():
    bulk()
    bulk(wait=LOOP.replace("try_wait", "test_wait"))
    # Another fence, by the thread itself or by all that the initialisation is ordered before.
    bulk(init="fence.proxy.async; bar.sync 0;")
    bulk(init="bar.sync 0; fence.proxy.async.shared::cta; bar.sync 0;")
    # The thread that copies is the one that initialised; the others must not look before it did.
    bulk(init=VISIBLE, wait="bar.sync 0;" + LOOP)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(wait=""), RaceFault, "has not been waited for"),
        # Only warp 0 waits.
        (dict(wait="setp.ge.u32 %p4, %tid, 32; @%p4 bra SKIP; " + LOOP + " SKIP:"), RaceFault, "without having waited for the mbarrier"),
        (dict(size="516"), Deadlock, "for an mbarrier phase"),
        (dict(init=VISIBLE + "bar.sync 0; @%p1 mbarrier.inval.shared::cta.b64 [%r21];"), MemoryFault, "no mbarrier is initialised"),
        (dict(init="bar.sync 0;"), RaceFault, "neither fence.mbarrier_init nor fence.proxy.async"),
        (dict(init=VISIBLE), RaceFault, "written by warp 0 .*mbarrier.init.*no barrier between"),
        # By a thread that initialised none, or before the initialisation.
        (dict(init=f"bar.sync 0; @!%p1 {VISIBLE} bar.sync 0;"), RaceFault, "neither fence.mbarrier_init nor"),
        (dict(init="setp.ge.u32 %p5, %tid, 32; @%p5 fence.proxy.async; bar.sync 0;"), RaceFault, "neither fence.mbarrier_init nor"),
        (dict(wait=LOOP + "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r21]; @%p1 mbarrier.arrive.shared::cta.b64 _, [%r21], 2;"),
         PtxError, "1 more arrivals than the 1"),
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
    @%p1 mbarrier.init.shared::cta.b64 [%r21], 1; {VISIBLE} bar.sync 0;
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


@pytest.mark.parametrize("fill_nan", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_every_rank_type_and_fill(rank, dtype, fill_nan):
    size, box = (5, 4, 3, 6, 24)[-rank:], (2, 1, 2, 2, 16)[-rank:]
    elements = math.prod(box)
    text = tensor_kernel(rank, elements // 2, elements)
    for start in ((0,) * rank, (-1,) * rank, [n - 1 for n in size]):
        x, back = torch.randn(size).to(dtype), torch.zeros(size, dtype=dtype)
        raw = torch.zeros(box, dtype=dtype)
        source, target = TensorMap(x, box, fill_nan=fill_nan), TensorMap(back, box)
        coordinates = np.array(start[::-1], np.int32)
        run_ptx(text, grid=1, args=[source, Out(raw), In(coordinates), target])
        want_back = torch.zeros_like(x)
        for at in np.ndindex(*box):
            where = tuple(a + b for a, b in zip(at, start, strict=True))
            if all(0 <= i < n for i, n in zip(where, size, strict=True)):
                assert raw[at] == x[where]
                want_back[where] = x[where]
            else:
                assert raw[at].isnan() if fill_nan else raw[at] == 0
        assert torch.equal(back, want_back)


def test_maps_that_hardware_would_refuse():
    for make, message in (
        (lambda: TensorMap(np.zeros((4, 5), np.float16), (4, 8)), "strides"),
        (lambda: TensorMap(np.zeros((4, 64), np.float16), (4, 64), 64), "at most the swizzle"),
        (lambda: TensorMap(np.zeros((4, 64), np.float16), (4,)), "axes"),
        (
            lambda: TensorMap(np.zeros((4, 64), np.int32), (4, 64), fill_nan=True),
            "int32 can't be filled with NaN",
        ),
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
    # One fence shows the mbarrier to the load, the other the result to the store.
    load, store = (found.span() for found in re.finditer(r"fence\.proxy\.async\.shared::cta;", ptx))
    for (begin, end), message in (
        (load, "mbarrier at .* was initialised by"),
        (store, r"no fence\.proxy\.async"),
    ):
        with pytest.raises(RaceFault, match=message):
            launch_triton(compiled, args, grid=(3, 3), ptx=ptx[:begin] + ptx[end:])
    unwaited = re.sub(r"mbarrier\.try_wait[^;]*;", "mov.pred complete, 1;", ptx)
    with pytest.raises(RaceFault, match="has not been waited for"):
        launch_triton(compiled, args, grid=(3, 3), ptx=unwaited)
