"""Each instruction against Python's unbounded integers, on random and extreme values."""

import numpy as np
import pytest

from .harness import elementwise

RNG = np.random.default_rng()
EDGES = {
    32: [0, 1, 2, 31, 32, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678],
    64: [0, 1, 63, 2**31, 2**63, 2**64 - 1, 2**63 - 1],
}


def values(bits, n=64):
    edges = list(EDGES.get(bits, [0, 1, 0x7FFF, 0x8000, 0xFFFF]))
    draw = RNG.integers(0, 2**bits, n - len(edges), dtype=np.uint64).tolist()
    mixed = edges + draw
    RNG.shuffle(mixed)
    return np.array(mixed, np.uint64).astype(f"u{bits // 8}")


def signed(v, bits):
    v = int(v) & ((1 << bits) - 1)
    return v - (1 << bits) if v >> (bits - 1) else v


def check(instruction, bits, reference, count=2, out_bits=None, last=None):
    """reference gets unsigned Python ints; its result is compared modulo 2**out_bits."""
    out_bits = out_bits or bits
    sources = [values(bits) for _ in range(count)]
    if last is not None:
        sources.append(last)
    got = elementwise(instruction, f"u{out_bits // 8}", *sources)
    want = [reference(*(int(v) for v in row)) & ((1 << out_bits) - 1) for row in zip(*sources, strict=True)]
    assert got.tolist() == want


S = signed
SMALL = lambda: RNG.integers(0, 70, 64).astype(np.uint32)  # noqa: E731


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize(
    ("op", "reference"),
    [
        ("add.s", lambda a, b: a + b),
        ("sub.u", lambda a, b: a - b),
        ("mul.lo.s", lambda a, b: a * b),
        ("and.b", lambda a, b: a & b),
        ("or.b", lambda a, b: a | b),
        ("xor.b", lambda a, b: a ^ b),
        ("min.u", min),
        ("max.u", max),
    ],
)
def test_binary(op, reference, bits):
    check(f"{op}{bits} %0, %1, %2;", bits, reference)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_signed(bits):
    check(f"min.s{bits} %0, %1, %2;", bits, lambda a, b: min(S(a, bits), S(b, bits)))
    check(f"max.s{bits} %0, %1, %2;", bits, lambda a, b: max(S(a, bits), S(b, bits)))
    check(f"mul.hi.s{bits} %0, %1, %2;", bits, lambda a, b: S(a, bits) * S(b, bits) >> bits)
    check(f"mul.hi.u{bits} %0, %1, %2;", bits, lambda a, b: a * b >> bits)
    check(f"neg.s{bits} %0, %1;", bits, lambda a: -a, 1)
    check(f"abs.s{bits} %0, %1;", bits, lambda a: abs(S(a, bits)), 1)
    check(f"not.b{bits} %0, %1;", bits, lambda a: ~a, 1)


def c_divide(a, b):
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


@pytest.mark.parametrize("bits", [32, 64])
def test_division(bits):
    divisor = values(bits)
    divisor[divisor == 0] = 3
    check(f"div.u{bits} %0, %1, %2;", bits, lambda a, b: a // b, 1, last=divisor)
    check(f"rem.u{bits} %0, %1, %2;", bits, lambda a, b: a % b, 1, last=divisor)
    check(f"div.s{bits} %0, %1, %2;", bits, lambda a, b: c_divide(S(a, bits), S(b, bits)), 1, last=divisor)
    rem = lambda a, b: S(a, bits) - S(b, bits) * c_divide(S(a, bits), S(b, bits))  # noqa: E731
    check(f"rem.s{bits} %0, %1, %2;", bits, rem, 1, last=divisor)


@pytest.mark.parametrize("bits", [16, 32])
def test_wide_products(bits):
    check(f"mul.wide.u{bits} %0, %1, %2;", bits, lambda a, b: a * b, out_bits=2 * bits)
    check(f"mul.wide.s{bits} %0, %1, %2;", bits, lambda a, b: S(a, bits) * S(b, bits), out_bits=2 * bits)
    a, b, c = values(bits), values(bits), values(2 * bits)
    got = elementwise(f"mad.wide.s{bits} %0, %1, %2, %3;", c.dtype, a, b, c)
    want = [(S(x, bits) * S(y, bits) + int(z)) % 4**bits for x, y, z in zip(a, b, c, strict=True)]
    assert got.tolist() == want


@pytest.mark.parametrize("bits", [32, 64])
def test_shifts_clamp_their_amount(bits):
    check(f"shl.b{bits} %0, %1, %2;", bits, lambda a, n: a << n, 1, last=SMALL())
    check(f"shr.u{bits} %0, %1, %2;", bits, lambda a, n: a >> n, 1, last=SMALL())
    check(f"shr.s{bits} %0, %1, %2;", bits, lambda a, n: S(a, bits) >> n, 1, last=SMALL())


def extract(a, pos, count, bits, is_signed):
    """bfe as the ISA's pseudocode writes it, bit by bit."""
    pos, count = pos & 255, count & 255
    msb = bits - 1
    sbit = 0 if not is_signed or count == 0 else a >> min(pos + count - 1, msb) & 1
    d = 0
    for i in range(msb + 1):
        bit = a >> (pos + i) & 1 if i < count and pos + i <= msb else sbit
        d |= bit << i
    return d


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("kind", ["u", "s"])
def test_bfe(bits, kind):
    a, pos, count = values(bits), SMALL(), SMALL()
    got = elementwise(f"bfe.{kind}{bits} %0, %1, %2, %3;", a.dtype, a, pos, count)
    want = [extract(int(x), int(p), int(n), bits, kind == "s") for x, p, n in zip(a, pos, count, strict=True)]
    assert got.tolist() == want


@pytest.mark.parametrize("bits", [32, 64])
def test_bfi(bits):
    f, base, pos, count = values(bits), values(bits), SMALL(), SMALL()
    got = elementwise(f"bfi.b{bits} %0, %1, %2, %3, %4;", f.dtype, f, base, pos, count)
    for a, b, p, n, d in zip(
        f.tolist(), base.tolist(), pos.tolist(), count.tolist(), got.tolist(), strict=True
    ):
        want = b
        for i in range(n):
            if p + i < bits:
                want = want & ~(1 << (p + i)) | (a >> i & 1 if i < bits else 0) << (p + i)
        assert d == want


def test_lop3_and_prmt():
    for table in (0x96, 0xE8, 0x40, 0xFE, int(RNG.integers(256))):

        def bitwise(a, b, c, table=table):
            return sum(
                (table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32)
            )

        check(f"lop3.b32 %0, %1, %2, %3, {table};", 32, bitwise, 3)

    def permute(a, b, selector):
        pool = (a | b << 32).to_bytes(8, "little")
        out = 0
        for i in range(4):
            nibble = selector >> (4 * i) & 15
            byte = pool[nibble & 7]
            out |= (255 * (byte >> 7) if nibble & 8 else byte) << (8 * i)
        return out

    check("prmt.b32 %0, %1, %2, %3;", 32, permute, 3)


def test_funnel_shift_and_counts():
    check(
        "shf.l.wrap.b32 %0, %1, %2, %3;",
        32,
        lambda a, b, n: ((b << 32 | a) << (n & 31)) >> 32,
        2,
        last=SMALL(),
    )
    check("shf.r.clamp.b32 %0, %1, %2, %3;", 32, lambda a, b, n: (b << 32 | a) >> min(n, 32), 2, last=SMALL())
    for bits in (32, 64):
        check(f"popc.b{bits} %0, %1;", bits, lambda a: a.bit_count(), 1, 32)
        check(f"clz.b{bits} %0, %1;", bits, lambda a, bits=bits: bits - a.bit_length(), 1, 32)
        check(f"brev.b{bits} %0, %1;", bits, lambda a, bits=bits: int(f"{a:0{bits}b}"[::-1], 2), 1)
    check("bfind.u32 %0, %1;", 32, lambda a: a.bit_length() - 1, 1)


@pytest.mark.parametrize(
    ("name", "test"), [("lt", int.__lt__), ("ge", int.__ge__), ("ne", int.__ne__), ("eq", int.__eq__)]
)
@pytest.mark.parametrize("kind", ["s", "u"])
def test_setp_selp(name, test, kind):
    convert = (lambda v: S(v, 32)) if kind == "s" else int
    code = f"setp.{name}.{kind}32 %p1, %1, %2; selp.b32 %0, 7, 9, %p1;"
    check(code, 32, lambda a, b: 7 if test(convert(a), convert(b)) else 9)


def test_setp_combines_and_gives_the_complement():
    code = "setp.gt.u32 %p3, %2, 0x80000000; setp.lt.and.u32 %p1|%p2, %1, %2, !%p3;"
    code += "selp.b32 %r1, 1, 0, %p1; selp.b32 %r2, 2, 0, %p2; or.b32 %0, %r1, %r2;"

    def reference(a, b):
        free = not b > 0x80000000
        return (a < b and free) + 2 * (not a < b and free)

    check(code, 32, reference)


@pytest.mark.parametrize(("op", "choose"), [("min", np.minimum), ("max", np.maximum)])
def test_minmax_relu(op, choose):
    x, y = np.array([-5, -5, 3, 7], np.int32), np.array([-2, 4, -6, 9], np.int32)
    got = elementwise(f"{op}.relu.s32 %0, %1, %2;", np.int32, x, y)
    np.testing.assert_array_equal(got, np.maximum(choose(x, y), 0))
