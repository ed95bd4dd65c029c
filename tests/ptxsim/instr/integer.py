"""Integer arithmetic, logic and bit manipulation (PTX ISA 9.7.1, 9.7.8)."""

import numpy as np

from ..decode import handles
from ..errors import UnsupportedInstruction

BITS = {"b16": 16, "u16": 16, "s16": 16, "b32": 32, "u32": 32, "s32": 32, "b64": 64, "u64": 64, "s64": 64}
FLOATING = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64", "f32x2")


def ufunc(machine, instr, typ, function, count):
    """A numpy ufunc applied to `count` sources of one type, straight into the destination."""
    d = machine.dst(instr.operands[0], typ, instr)
    a = [machine.src(o, typ, instr) for o in instr.operands[1 : 1 + count]]
    if len(instr.operands) != 1 + count:
        raise UnsupportedInstruction(f"{len(instr.operands)} operands, expected {1 + count}", instr)

    def run():
        function(*a, out=d, where=machine.where)

    return run


def computed(machine, d, compute):
    """A handler that stores `compute()` where threads are active."""
    return lambda: machine.put(d, compute())


@handles("add", "sub")
def add(machine, instr, mods, index):
    typ = mods.type()
    if typ in FLOATING:
        from .floating import add_float

        return add_float(machine, instr, mods, typ)
    if mods.take("cc", "sat"):
        raise UnsupportedInstruction("carry and saturation are not implemented", instr)
    mods.done()
    return ufunc(machine, instr, typ, np.add if instr.op == "add" else np.subtract, 2)


@handles("mul")
def mul(machine, instr, mods, index):
    typ = mods.type()
    if typ in FLOATING:
        from .floating import mul_float

        return mul_float(machine, instr, mods, typ)
    half = mods.need("lo", "hi", "wide")
    mods.done()
    if half == "lo":
        return ufunc(machine, instr, typ, np.multiply, 2)
    d, a, b = _product_operands(machine, instr, typ, half)
    return computed(machine, d, lambda: _product(a, b, typ, half))


@handles("mad")
def mad(machine, instr, mods, index):
    typ = mods.type()
    if typ in FLOATING:
        from .floating import fma_float

        return fma_float(machine, instr, mods, typ)
    half = mods.need("lo", "hi", "wide")
    mods.done()
    d, a, b = _product_operands(machine, instr, typ, half)
    wide = _wide(typ) if half == "wide" else typ
    c = machine.src(instr.operands[3], wide, instr)
    if half == "lo":
        return computed(machine, d, lambda: a * b + c)
    return computed(machine, d, lambda: _product(a, b, typ, half) + c)


@handles("mul24", "mad24")
def mul24(machine, instr, mods, index):
    raise UnsupportedInstruction("24-bit products are not implemented", instr)


def _wide(typ):
    return f"{typ[0]}{2 * int(typ[1:])}"


def _product_operands(machine, instr, typ, half):
    d = machine.dst(instr.operands[0], _wide(typ) if half == "wide" else typ, instr)
    return d, machine.src(instr.operands[1], typ, instr), machine.src(instr.operands[2], typ, instr)


def _product(a, b, typ, half):
    bits, signed = int(typ[1:]), typ[0] == "s"
    if bits < 64:
        wide = np.dtype(f"{'i' if signed else 'u'}{bits // 4}").type
        product = np.multiply(a, b, dtype=wide)
        return (
            product
            if half == "wide"
            else (product >> wide(bits)).astype(f"{'i' if signed else 'u'}{bits // 8}")
        )
    high = _mul_hi_u64(np.asarray(a).view(np.uint64), np.asarray(b).view(np.uint64))
    if signed:  # high word of the signed product: subtract the other factor for each negative one
        ua, ub = np.asarray(a).view(np.uint64), np.asarray(b).view(np.uint64)
        high = high - np.where(a < 0, ub, np.uint64(0)) - np.where(b < 0, ua, np.uint64(0))
        return high.view(np.int64)
    return high


def _mul_hi_u64(a, b):
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    al, ah, bl, bh = a & low, a >> shift, b & low, b >> shift
    middle = ((al * bl) >> shift) + ((ah * bl) & low) + ((al * bh) & low)
    return ah * bh + ((ah * bl) >> shift) + ((al * bh) >> shift) + (middle >> shift)


@handles("div", "rem")
def div(machine, instr, mods, index):
    typ = mods.type()
    if typ in FLOATING:
        from .floating import div_float

        return div_float(machine, instr, mods, typ)
    mods.done()
    d = machine.dst(instr.operands[0], typ, instr)
    a, b = (machine.src(o, typ, instr) for o in instr.operands[1:3])
    remainder = instr.op == "rem"

    def compute():
        """C's division: truncation towards zero; a zero divisor gives all ones (remainder: the dividend)."""
        zero = b == 0
        safe = np.where(zero, b.dtype.type(1), b)
        quotient = a // safe
        if typ[0] == "s":
            quotient = quotient + ((quotient * safe != a) & ((a < 0) != (safe < 0)))
        quotient = np.where(zero, np.array(-1).astype(b.dtype), quotient).astype(b.dtype)
        return np.where(zero, a, a - quotient * safe) if remainder else quotient

    return computed(machine, d, compute)


@handles("min", "max")
def minmax(machine, instr, mods, index):
    typ = mods.type()
    if typ in FLOATING:
        from .floating import minmax_float

        return minmax_float(machine, instr, mods, typ)
    relu = typ == "s32" and mods.flag("relu")
    mods.done()
    choose = np.minimum if instr.op == "min" else np.maximum
    if relu:
        d = machine.dst(instr.operands[0], typ, instr)
        x, y = (machine.src(o, typ, instr) for o in instr.operands[1:])
        return computed(machine, d, lambda: np.maximum(choose(x, y), 0))
    return ufunc(machine, instr, typ, choose, 2)


@handles("neg", "abs")
def neg(machine, instr, mods, index):
    typ = mods.type()
    if typ in FLOATING:
        from .floating import sign_float

        return sign_float(machine, instr, mods, typ)
    mods.done()
    return ufunc(machine, instr, typ, np.negative if instr.op == "neg" else np.absolute, 1)


@handles("and", "or", "xor")
def logic(machine, instr, mods, index):
    typ = mods.type()
    mods.done()
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[instr.op]
    if typ == "pred":
        d = machine.dst(instr.operands[0], typ, instr)
        a, b = (machine.operands.predicate(o, instr) for o in instr.operands[1:3])
        return computed(machine, d, lambda: function(a(), b()))
    return ufunc(machine, instr, typ, function, 2)


@handles("not", "cnot")
def invert(machine, instr, mods, index):
    typ = mods.type()
    mods.done()
    if instr.op == "not":
        return ufunc(machine, instr, typ, np.invert, 1)
    d, a = machine.dst(instr.operands[0], typ, instr), machine.src(instr.operands[1], typ, instr)
    return computed(machine, d, lambda: (a == 0).astype(d.dtype))


@handles("lop3")
def lop3(machine, instr, mods, index):
    typ = mods.type()
    mods.done()
    d, *abc = instr.operands[:4]
    d = machine.dst(d, typ, instr)
    a, b, c = (machine.src(o, typ, instr) for o in abc)
    table = instr.operands[4].value & 0xFF

    def compute():
        """Bit i of the table answers for (a, b, c) = the bits of i."""
        result = np.zeros(machine.threads, d.dtype)
        for i in range(8):
            if table >> i & 1:
                term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
                result |= term
        return result

    return computed(machine, d, compute)


@handles("shl", "shr")
def shift(machine, instr, mods, index):
    typ = mods.type()
    mods.done()
    bits = BITS[typ]
    d = machine.dst(instr.operands[0], typ, instr)
    a, n = machine.src(instr.operands[1], typ, instr), machine.src(instr.operands[2], "u32", instr)
    left, signed = instr.op == "shl", typ[0] == "s"

    def compute():
        """Amounts beyond the width give 0, or copies of the sign."""
        over = n >= bits
        amount = np.minimum(n, bits - 1).astype(a.dtype)
        if left:
            return np.where(over, a.dtype.type(0), a << amount)
        shifted = a >> amount
        return shifted if signed else np.where(over, a.dtype.type(0), shifted)

    return computed(machine, d, compute)


@handles("shf")
def funnel(machine, instr, mods, index):
    side, mode, typ = mods.need("l", "r"), mods.need("wrap", "clamp"), mods.type()
    mods.done()
    d = machine.dst(instr.operands[0], typ, instr)
    low, high, n = (machine.src(o, "u32", instr) for o in instr.operands[1:4])

    def compute():
        both = (np.asarray(high).astype(np.uint64) << np.uint64(32)) | low
        amount = (n & np.uint32(31) if mode == "wrap" else np.minimum(n, np.uint32(32))).astype(np.uint64)
        if side == "l":
            return ((both << amount) >> np.uint64(32)).astype(np.uint32)
        return (both >> amount).astype(np.uint32)

    return computed(machine, d, compute)


@handles("bfe")
def extract(machine, instr, mods, index):
    typ = mods.type()
    mods.done()
    bits, signed = BITS[typ], typ[0] == "s"
    d = machine.dst(instr.operands[0], typ, instr)
    a = machine.src(instr.operands[1], typ, instr)
    pos, length = (machine.src(o, "u32", instr) for o in instr.operands[2:4])

    def compute():
        start, count = (pos & np.uint32(255)).astype(np.int64), (length & np.uint32(255)).astype(np.int64)
        wide = np.asarray(a).view(f"u{bits // 8}").astype(np.uint64)
        field = np.where(start < bits, wide >> np.minimum(start, bits - 1).astype(np.uint64), np.uint64(0))
        mask = np.where(
            count >= 64,
            ~np.uint64(0),
            (np.uint64(1) << np.minimum(count, 63).astype(np.uint64)) - np.uint64(1),
        )
        field = field & mask
        if signed:
            top = np.minimum(start + count - 1, bits - 1)
            sign = (wide >> np.maximum(top, 0).astype(np.uint64)) & np.uint64(1)
            field = np.where((sign == 1) & (count > 0), field | ~mask, field)
            # A field that reaches beyond the source is filled with the source's sign.
            beyond = (start + count > bits) & (count > 0) & (sign == 1)
            have = np.maximum(bits - start, 0)
            fill = np.where(
                have >= 64,
                np.uint64(0),
                ~((np.uint64(1) << np.minimum(have, 63).astype(np.uint64)) - np.uint64(1)),
            )
            field = np.where(beyond, field | fill, field)
        return field.astype(f"u{bits // 8}").view(d.dtype)

    return computed(machine, d, compute)


@handles("bfi")
def insert(machine, instr, mods, index):
    typ = mods.type()
    mods.done()
    bits = BITS[typ]
    d = machine.dst(instr.operands[0], typ, instr)
    f, base = (machine.src(o, typ, instr) for o in instr.operands[1:3])
    pos, length = (machine.src(o, "u32", instr) for o in instr.operands[3:5])

    def compute():
        start = (pos & np.uint32(255)).astype(np.uint64)
        count = np.minimum(length & np.uint32(255), np.uint32(bits)).astype(np.uint64)
        one, full = np.uint64(1), np.uint64(0xFFFFFFFFFFFFFFFF)
        mask = np.where(count >= 64, full, (one << np.minimum(count, np.uint64(63))) - one)
        mask = np.where(start < bits, mask << np.minimum(start, np.uint64(63)), np.uint64(0))
        moved = np.asarray(f).astype(np.uint64) << np.minimum(start, np.uint64(63))
        return ((np.asarray(base).astype(np.uint64) & ~mask) | (moved & mask)).astype(d.dtype)

    return computed(machine, d, compute)


@handles("bmsk")
def bitmask(machine, instr, mods, index):
    mode = mods.need("wrap", "clamp")
    typ = mods.type()
    mods.done()
    d = machine.dst(instr.operands[0], typ, instr)
    pos, length = (machine.src(o, "u32", instr) for o in instr.operands[1:3])

    def compute():
        limit = np.uint32(31) if mode == "wrap" else np.uint32(255)
        start, count = (
            np.minimum(pos & limit, 32).astype(np.uint64),
            np.minimum(length & limit, 32).astype(np.uint64),
        )
        return (((np.uint64(1) << count) - np.uint64(1)) << start).astype(np.uint32)

    return computed(machine, d, compute)


@handles("prmt")
def permute(machine, instr, mods, index):
    typ = mods.type()
    mods.done()
    d = machine.dst(instr.operands[0], typ, instr)
    a, b, selector = (machine.src(o, typ, instr) for o in instr.operands[1:4])

    def compute():
        """Each nibble of the selector picks one of 8 bytes; its top bit asks for that byte's sign instead."""
        pool = (np.asarray(b).astype(np.uint64) << np.uint64(32)) | a
        result = np.zeros(machine.threads, np.uint64)
        for i in range(4):
            nibble = (np.asarray(selector).astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)
            byte = (pool >> (np.uint64(8) * (nibble & np.uint64(7)))) & np.uint64(255)
            byte = np.where(
                nibble & np.uint64(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte
            )
            result |= byte << np.uint64(8 * i)
        return result.astype(np.uint32)

    return computed(machine, d, compute)


@handles("popc", "clz", "bfind", "brev", "fns")
def count_bits(machine, instr, mods, index):
    shift_amount = mods.flag("shiftamt")
    typ = mods.type()
    mods.done()
    if instr.op == "fns":
        raise UnsupportedInstruction("fns is not implemented", instr)
    bits = BITS[typ]
    d = machine.dst(instr.operands[0], typ if instr.op == "brev" else "u32", instr)
    a = machine.src(instr.operands[1], typ, instr)

    def spread():
        value = a if typ[0] != "s" else np.where(a < 0, ~a, a)
        value = np.broadcast_to(np.ascontiguousarray(value), machine.threads).copy().view(f"u{bits // 8}")
        return np.unpackbits(
            value.view(np.uint8).reshape(machine.threads, bits // 8), axis=1, bitorder="little"
        )

    def compute():
        b = spread()
        if instr.op == "popc":
            return b.sum(1).astype(np.uint32)
        if instr.op == "brev":
            return np.packbits(b[:, ::-1], axis=1, bitorder="little").view(d.dtype).reshape(-1)
        none = ~b.any(1)
        leading = np.where(none, bits, b[:, ::-1].argmax(1))
        if instr.op == "clz":
            return leading.astype(np.uint32)
        found = leading if shift_amount else bits - 1 - leading
        return np.where(none, 0xFFFFFFFF, found).astype(np.uint32)

    return computed(machine, d, compute)


@handles("sad", "dp4a", "dp2a", "addc", "subc", "madc", "copysign")
def rare(machine, instr, mods, index):
    if instr.op == "copysign":
        from .floating import copysign_float

        return copysign_float(machine, instr, mods)
    raise UnsupportedInstruction(f"opcode {instr.op} is not implemented", instr)
