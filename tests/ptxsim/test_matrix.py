"""Fragment layouts written out lane by lane from the PTX ISA's figures, independent of the simulator's reshapes."""

import numpy as np
import pytest

from . import In, Out, UnsupportedInstruction
from .harness import run
from .rounding import bf16_to_f32, f32_to_bf16, f32_to_tf32

RNG = np.random.default_rng()


def codes(x, typ):
    """Bits of a float32 array in a matrix type, and the values those bits stand for."""
    if typ == "f16":
        h = x.astype(np.float16)
        return h.view(np.uint16), h.astype(np.float64)
    if typ == "bf16":
        c = f32_to_bf16(x)
        return c, bf16_to_f32(c).astype(np.float64)
    c = f32_to_tf32(x)
    return c, c.view(np.float32).astype(np.float64)


def a_element(typ, k, lane, i):
    """(row, column) of element i of the A fragment: ISA sections "Matrix Fragments for mma.m16n8k16", "...k8"."""
    group, thread = lane >> 2, lane % 4
    if typ == "tf32":
        row = group if i in (0, 2) else group + 8
        return row, thread + (4 if i >= 2 else 0)
    row = group if i in (0, 1, 4, 5) else group + 8
    return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_element(typ, lane, i):
    group, thread = lane >> 2, lane % 4
    if typ == "tf32":
        return thread + 4 * i, group
    return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group


def c_element(lane, i):
    group, thread = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def load_fragments(name, pointer, count):
    """PTX that loads `count` b32 registers %r<name>.. of each lane from [pointer][lane][count]."""
    lines = [f"mad.lo.u64 %at0, %wide, {4 * count}, {pointer};"]
    return "\n".join(lines + [f"ld.global.b32 %r{name + i}, [%at0+{4 * i}];" for i in range(count)])


@pytest.mark.parametrize(
    ("typ", "k"), [("f16", 16), ("bf16", 16), ("tf32", 8), ("f16", 8), ("bf16", 8), ("tf32", 4)]
)
def test_mma(typ, k):
    a_codes, a = codes(RNG.standard_normal((16, k)).astype(np.float32), typ)
    b_codes, b = codes(RNG.standard_normal((k, 8)).astype(np.float32), typ)
    c = RNG.standard_normal((16, 8)).astype(np.float32)
    per_word = 1 if typ == "tf32" else 2
    count_a, count_b = 16 * k // 32, 8 * k // 32
    lanes_a = np.zeros((32, count_a), a_codes.dtype)
    lanes_b = np.zeros((32, count_b), b_codes.dtype)
    lanes_c = np.zeros((32, 4), np.float32)
    for lane in range(32):
        for i in range(count_a):
            lanes_a[lane, i] = a_codes[a_element(typ, k, lane, i)]
        for i in range(count_b):
            lanes_b[lane, i] = b_codes[b_element(typ, lane, i)]
        for i in range(4):
            lanes_c[lane, i] = c[c_element(lane, i)]
    na, nb = count_a // per_word, count_b // per_word
    regs = lambda start, n: "{" + ", ".join(f"%r{start + i}" for i in range(n)) + "}"  # noqa: E731
    floats = "{" + ", ".join(f"%f{i}" for i in range(4)) + "}"
    body = "\n".join(
        [
            load_fragments(0, "%ptr0", na), load_fragments(10, "%ptr1", nb), load_fragments(20, "%ptr2", 4),
            *(f"mov.b32 %f{i}, %r{20 + i};" for i in range(4)),
            f"mma.sync.aligned.m16n8k{k}.row.col.f32.{typ}.{typ}.f32 {floats}, {regs(0, na)}, {regs(10, nb)}, {floats};",
            "mad.lo.u64 %at0, %wide, 16, %ptr3;",
            *(f"st.global.f32 [%at0+{4 * i}], %f{i};" for i in range(4)),
        ]
    )  # fmt: skip
    d = np.zeros((32, 4), np.float32)
    run(body, In(lanes_a.view(np.uint32)), In(lanes_b.view(np.uint32)), In(lanes_c), Out(d))
    want = a @ b + c
    for lane in range(32):
        for i in range(4):
            assert abs(d[lane, i] - want[c_element(lane, i)]) < 1e-5


def test_mma_of_a_wrong_shape_is_refused():
    with pytest.raises(UnsupportedInstruction):
        run(
            "mma.sync.aligned.m16n8k16.row.col.f32.tf32.tf32.f32 {%f0,%f1,%f2,%f3}, {%r0,%r1,%r2,%r3}, {%r4,%r5}, {%f0,%f1,%f2,%f3};"
        )


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(count, transposed):
    matrices = RNG.integers(0, 65536, (count, 8, 8)).astype(np.uint16)
    rows = RNG.permutation(count * 8)  # row r of matrix i lies wherever lane 8i + r points
    memory = np.zeros((count * 8, 8), np.uint16)
    memory[rows] = matrices.reshape(-1, 8)
    where = np.zeros(32, np.uint32)
    where[: count * 8] = rows * 16
    out = np.zeros((32, count), np.uint32)
    regs = "{" + ", ".join(f"%r{i}" for i in range(count)) + "}" if count > 1 else "{%r0}"
    body = f"""
        mad.lo.u64 %at0, %wide, 16, %ptr0;
        mov.u32 %r20, sm;
        setp.lt.u32 %p1, %tid, {8 * count};
        mad.lo.u32 %r22, %tid, 16, %r20;
        @%p1 ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%at0];
        @%p1 st.shared.v4.b32 [%r22], {{%r10, %r11, %r12, %r13}};
        mad.lo.u64 %at1, %wide, 4, %ptr1;
        ld.global.u32 %r21, [%at1];
        add.u32 %r21, %r21, %r20;
        ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 {regs}, [%r21];
        mad.lo.u64 %at2, %wide, {4 * count}, %ptr2;
        """ + "\n".join(f"st.global.b32 [%at2+{4 * i}], %r{i};" for i in range(count))
    run(body, In(memory), In(where), Out(out), shared=512)
    for lane in range(32):
        for i in range(count):
            row, column = lane // 4, 2 * (lane % 4)
            pair = (
                matrices[i, [column, column + 1], row]
                if transposed
                else matrices[i, row, [column, column + 1]]
            )
            assert out[lane, i] == int(pair[0]) | int(pair[1]) << 16


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix_is_the_inverse_of_ldmatrix(transposed):
    fragments = RNG.integers(0, 2**32, (32, 4), dtype=np.uint32)
    out = np.zeros((4, 8, 8), np.uint16)
    body = f"""
        {load_fragments(0, "%ptr0", 4)}
        mov.u32 %r20, sm;
        mad.lo.u32 %r21, %tid, 16, %r20;
        stmatrix.sync.aligned.m8n8.x4{".trans" if transposed else ""}.shared.b16 [%r21], {{%r0, %r1, %r2, %r3}};
        ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r21];
        mad.lo.u64 %at1, %wide, 16, %ptr1;
        st.global.v4.b32 [%at1], {{%r4, %r5, %r6, %r7}};
        """
    run(body, In(fragments), Out(out), shared=512)
    for lane in range(32):
        for i in range(4):
            row, column = lane // 4, 2 * (lane % 4)
            for e in range(2):
                want = int(fragments[lane, i]) >> 16 * e & 0xFFFF
                assert out[(i, column + e, row) if transposed else (i, row, column + e)] == want


def swizzled(offset, width):
    """16-byte chunks of 128-byte rows, XORed with the row number modulo the pattern (ISA: swizzling modes)."""
    if width == 16:
        return offset
    chunk, row = offset >> 4, offset >> 7
    return (chunk ^ (row % (width // 16))) << 4 | offset & 15


def place(matrix, width, k_major, lead, stride):
    """Shared-memory image (byte offset -> 16-bit code) of a (rows, 16) operand in one of wgmma's canonical layouts.

    Written from the table of canonical layouts ("Strides") with T = 8 elements of 16 bits, one element at a time.
    """
    image = {}
    rows, depth = matrix.shape
    for r in range(rows):
        for k in range(depth):
            if k_major:
                inner = (k // 8) * lead if width == 16 else (k // 8) * 16
                offset = (r // 8) * stride + (r % 8) * width + inner + (k % 8) * 2
            elif width == 16:
                offset = (r // 8) * stride + (k // 8) * lead + (k % 8) * 16 + (r % 8) * 2
            else:
                per = width // 2
                offset = (r // per) * lead + (k // 8) * stride + (k % 8) * width + (r % per) * 2
            at = swizzled(offset, width)
            assert at not in image
            image[at] = matrix[r, k]
    return image


MODES = {16: 0, 128: 1, 64: 2, 32: 3}
CASES = [  # width, K-major, leading and stride offsets of a 64 x 16 tile
    (128, True, 16, 1024), (64, True, 16, 512), (32, True, 16, 256), (16, True, 128, 256),
    (128, False, 2048, 1024), (64, False, 1024, 512), (32, False, 512, 256), (16, False, 1024, 128),
]  # fmt: skip


@pytest.mark.parametrize("typ", ["f16", "bf16"])
@pytest.mark.parametrize("a_in_registers", [False, True])
@pytest.mark.parametrize(("width", "k_major", "lead", "stride"), CASES)
def test_wgmma(width, k_major, lead, stride, a_in_registers, typ):
    a_codes, a = codes(RNG.standard_normal((64, 16)).astype(np.float32), typ)
    b_codes, b = codes(RNG.standard_normal((64, 16)).astype(np.float32), typ)
    image = np.zeros((2, 8192), np.uint8)  # an unused byte may be any number: both images start as zeros
    for slot, matrix in enumerate((a_codes, b_codes)):
        for at, code in place(matrix, width, k_major, lead, stride).items():
            image[slot, at : at + 2] = np.frombuffer(code.tobytes(), np.uint8)
    fragments = np.zeros((128, 8), np.uint16)
    for thread in range(128):
        for i in range(8):
            row, column = a_element(typ, 16, thread % 32, i)
            fragments[thread, i] = a_codes[16 * (thread // 32) + row, column]
    acc = "{" + ", ".join(f"%f{i}" for i in range(32)) + "}"
    first = "{%r100, %r101, %r102, %r103}" if a_in_registers else "%d1"
    flags = f"1, 1, {int(not k_major)}" if a_in_registers else f"1, 1, {int(not k_major)}, {int(not k_major)}"
    fields = lead // 16 << 16 | stride // 16 << 32 | MODES[width] << 62
    copy = []
    for i in range(8):
        copy.append(f"ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%at0+{2048 * i}];")
        copy.append(f"st.shared.v4.b32 [%r20+{2048 * i}], {{%r0, %r1, %r2, %r3}};")
    body = f"""
        mad.lo.u64 %at0, %wide, 16, %ptr0;
        mov.u32 %r21, sm;
        mad.lo.u32 %r20, %tid, 16, %r21;
        {" ".join(copy)}
        {load_fragments(100, "%ptr1", 4)}
        fence.proxy.async.shared::cta;
        bar.sync 0;
        shr.u32 %r22, %r21, 4;
        cvt.u64.u32 %d1, %r22;
        or.b64 %d1, %d1, {fields};
        add.u64 %d2, %d1, 512;
        {" ".join(f"mov.f32 %f{i}, 0f3F800000;" for i in range(32))}
        mov.pred %p1, 1;
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n64k16.f32.{typ}.{typ} {acc}, {first}, %d2, 0, {flags};
        wgmma.mma_async.sync.aligned.m64n64k16.f32.{typ}.{typ} {acc}, {first}, %d2, %p1, {flags};
        wgmma.commit_group.sync.aligned;
        wgmma.wait_group.sync.aligned 0;
        mad.lo.u64 %at2, %wide, 128, %ptr2;
        """ + "\n".join(f"st.global.f32 [%at2+{4 * i}], %f{i};" for i in range(32))
    out = np.zeros((128, 32), np.float32)
    run(body, In(image), In(fragments.view(np.uint32)), Out(out), shared=16384, threads=128)
    want = 2 * a @ b.T
    for thread in range(128):
        lane, warp = thread % 32, thread // 32
        for i in range(32):  # ISA figure "WGMMA .m64nNk16 register fragment layout for accumulator matrix D"
            row = 16 * warp + lane // 4 + (8 if i % 4 >= 2 else 0)
            column = 8 * (i // 4) + (lane % 4) * 2 + (i & 1)
            assert abs(out[thread, i] - want[row, column]) < 1e-4


def test_wrong_fragment_index_is_visible():
    """Swapping two A registers must change the product, or the test above could not fail."""
    a_codes, a = codes(RNG.standard_normal((16, 16)).astype(np.float32), "f16")
    lanes = np.zeros((32, 8), np.uint16)
    for lane in range(32):
        for i in range(8):
            lanes[lane, i] = a_codes[a_element("f16", 16, lane, i)]
    identity = np.zeros((32, 4), np.uint16)
    for lane in range(32):
        for i in range(4):
            k, n = b_element("f16", lane, i)
            identity[lane, i] = 0x3C00 if k == n else 0
    results = []
    for order in ("%r0, %r1, %r2, %r3", "%r1, %r0, %r2, %r3"):
        d = np.zeros((32, 4), np.float32)
        body = f"""
            {load_fragments(0, "%ptr0", 4)} {load_fragments(10, "%ptr1", 2)}
            mov.f32 %f9, 0f00000000;
            mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{%f0, %f1, %f2, %f3}}, {{{order}}}, {{%r10, %r11}},
                {{%f9, %f9, %f9, %f9}};
            mad.lo.u64 %at0, %wide, 16, %ptr2;
            st.global.v4.f32 [%at0], {{%f0, %f1, %f2, %f3}};"""
        run(body, In(lanes.view(np.uint32)), In(identity.view(np.uint32)), Out(d))
        results.append(
            np.array([[d[lane, i] == a[c_element(lane, i)] for i in range(4)] for lane in range(32)])
        )
    assert results[0].all()
    assert not results[1].any()
