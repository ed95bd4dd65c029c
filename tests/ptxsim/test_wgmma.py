"""Faults around wgmma's operands, planted in a kernel written by hand: two chained products of 64 x 8 x 16.

Their layouts are tested in test_matrix.py.
"""

import numpy as np
import pytest

from . import Out, RaceFault, UnsupportedInstruction
from .harness import run

ACC = "{%f0, %f1, %f2, %f3}"
PRODUCT = (
    f"wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {ACC}, {{%r0, %r1, %r2, %r3}}, %d2, %p1, 1, 1, 0;"
)
FROM_SHARED = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {ACC}, %d1, %d2, %p1, 1, 1, 0, 0;"
# Every element of both operands is 1; a from shared memory lies 1024 bytes above b.
PRODUCTS = """
    mov.u32 %r20, sm; mad.lo.u32 %r21, %tid, 4, %r20; mov.pred %p1, 1;
    mov.b32 %r10, 0x3C003C00;
    BYTES
    PROXY bar.sync 0;
    shr.u32 %r22, %r20, 4; cvt.u64.u32 %d2, %r22; or.b64 %d2, %d2, FIELDS; add.u64 %d1, %d2, 64;
    mov.b32 %r0, %r10; mov.b32 %r1, %r10; mov.b32 %r2, %r10; mov.b32 %r3, %r10;
    mov.f32 %f0, 0f3F800000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
    FENCE
    FIRST
    MIDDLE
    SECOND
    COMMIT
    FLYING
    WAIT
    AFTER
    mad.lo.u64 %at0, %wide, 16, %ptr0; st.global.v4.f32 [%at0], {%f0, %f1, %f2, %f3};
    """
PARTS = {
    "BYTES": " ".join(f"st.shared.b32 [%r21+{at}], %r10;" for at in range(0, 4096, 512)),
    "PROXY": "fence.proxy.async.shared::cta;",
    "FIELDS": str(128 // 16 << 16 | 256 // 16 << 32),
    "FENCE": "wgmma.fence.sync.aligned;",
    "FIRST": PRODUCT,
    "MIDDLE": "",
    "SECOND": PRODUCT,
    "COMMIT": "wgmma.commit_group.sync.aligned;",
    "FLYING": "",
    "WAIT": "wgmma.wait_group.sync.aligned 0;",
    "AFTER": "",
}
COMMITTED_APART = {"MIDDLE": PARTS["COMMIT"]}
# A second set of operands, that the second product may use.
OTHERS = "mov.b32 %r4, %r10; mov.b32 %r5, %r10; mov.b32 %r6, %r10; mov.b32 %r7, %r10;"
OTHER_A = PRODUCT.replace("%r0, %r1, %r2, %r3", "%r4, %r5, %r6, %r7")
OTHER_ACC = PRODUCT.replace(ACC, "{%f4, %f5, %f6, %f7}")
WIDER = PRODUCT.replace("n8k", "n16k").replace(ACC, "{%f0, %f1, %f2, %f3, %f4, %f5, %f6, %f7}")


def products(**changes):
    body = PRODUCTS
    for name, text in {**PARTS, **changes}.items():
        body = body.replace(name, text)
    out = np.zeros((128, 4), np.float32)
    run(body, Out(out), shared=4096, threads=128)
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        COMMITTED_APART,
        {"FIRST": FROM_SHARED, "SECOND": FROM_SHARED},
        {"MIDDLE": OTHERS + PARTS["FENCE"], "SECOND": OTHER_A},
        # Reading a fragment, or touching registers of neither, does nobody harm.
        {"FLYING": "mov.b32 %r9, %r0; mov.b32 %r4, %r10;"},
        # Waited for, fenced, written: in this order anything may be.
        {"MIDDLE": PARTS["COMMIT"] + PARTS["WAIT"] + "mov.b32 %r0, %r10; mul.f32 %f0, %f0, 0f3F800000;" + PARTS["FENCE"]},
    ],
)  # fmt: skip
def test_correct_use(changes):
    assert (products(**changes) == 33).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"FENCE": ""}, r"first wgmma, and no wgmma\.fence"),
        # Only one warp of the four fences.
        ({"FENCE": f"setp.lt.u32 %p2, %tid, 32; @%p2 {PARTS['FENCE']}"}, r"first wgmma, and no wgmma\.fence"),
        # Written behind the fence: accumulator, fragment, and both kinds between products.
        ({"FENCE": PARTS["FENCE"] + "mov.f32 %f2, 0f3F800000;"}, r"%f2 was used by line \d+: mov.*no wgmma\.fence between"),
        ({"FENCE": PARTS["FENCE"] + "mov.b32 %r1, %r10;"}, r"%r1 was used by line \d+: mov.*no wgmma\.fence between"),
        ({"MIDDLE": PARTS["COMMIT"] + PARTS["WAIT"] + "add.f32 %f3, %f3, %f3;"}, r"%f3 was used by .*add\.f32.*no wgmma\.fence"),
        ({"MIDDLE": OTHERS, "SECOND": OTHER_A}, r"%r4 was used by .*no wgmma\.fence between"),
        # Read before a product that overwrites it: also an access.
        ({"MIDDLE": PARTS["COMMIT"] + PARTS["WAIT"] + "mov.f32 %f9, %f1;"}, r"%f1 was used by .*no wgmma\.fence"),
        # The same accumulators in another shape: nothing orders them.
        ({"MIDDLE": PARTS["COMMIT"] + PARTS["WAIT"], "SECOND": WIDER}, r"%f0 was used by .*no wgmma\.fence between"),
        ({"MIDDLE": PARTS["COMMIT"] + PARTS["FENCE"], "SECOND": WIDER}, "still in flight"),
        # In flight: accumulators read or overwritten, fragments overwritten.
        ({"FLYING": "mov.f32 %f9, %f1;"}, r"%f1 is read while the product of line \d+"),
        ({"FLYING": "mov.f32 %f1, 0f00000000;"}, "%f1 is overwritten while"),
        ({"FLYING": "mov.b32 %r2, 0;"}, "%r2 is overwritten while"),
        ({"FLYING": "setp.ge.u32 %p3, %tid, 96; @%p3 mov.b32 %r2, 0;"}, "%r2 is overwritten while"),
        # Waited for too few, in each way.
        ({"WAIT": ""}, "%f0 is read while"),
        ({"COMMIT": ""}, "%f0 is read while"),
        ({**COMMITTED_APART, "WAIT": "wgmma.wait_group.sync.aligned 1;"}, "%f0 is read while"),
        # Operands in shared memory: no proxy fence; overwritten in flight.
        ({"PROXY": ""}, r"no fence\.proxy\.async"),
        ({"FLYING": "st.shared.b32 [%r21], %r10;"}, "while a wgmma in flight may still read it"),
        ({"FIRST": FROM_SHARED, "SECOND": FROM_SHARED, "FLYING": "st.shared.b32 [%r21+1024], %r10;"}, "may still read it"),
    ],
)  # fmt: skip
def test_planted_faults(changes, message):
    with pytest.raises(RaceFault, match=message):
        products(**changes)


def test_products_by_part_of_a_warpgroup():
    with pytest.raises(UnsupportedInstruction, match="needs whole warpgroups"):
        run(PARTS["FENCE"], threads=96)


def test_other_accumulators_may_be_used_while_a_product_is_in_flight():
    other = "mov.f32 %f4, %f0; mov.f32 %f5, %f0; mov.f32 %f6, %f0; mov.f32 %f7, %f0;"
    out = products(
        BYTES=PARTS["BYTES"] + "mov.f32 %f0, 0f3F800000;" + other,
        SECOND=OTHER_ACC,
        **COMMITTED_APART,
        WAIT="wgmma.wait_group.sync.aligned 1; mov.f32 %f9, %f0; wgmma.wait_group.sync.aligned 0;",
        AFTER="add.f32 %f0, %f9, %f4; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;",
    )
    assert (out == 34).all()
