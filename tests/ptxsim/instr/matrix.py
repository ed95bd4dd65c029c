"""ldmatrix, stmatrix, movmatrix and mma.sync (PTX ISA 9.7.14.5). Fragments are described in the ISA's terms:
group = lane / 4, position = lane % 4.

mma accumulates in float32: products of fp16, bf16 and tf32 are exact there, and sums are rounded after each
addition in an order of numpy's choosing. Hardware keeps fewer bits in another order; neither is specified.
"""

import numpy as np

from .. import access, rounding
from ..decode import handles
from ..errors import UnsupportedInstruction
from ..parser import Vec
from .warp import collective


def registers(machine, operand, typ, instr, writable=False):
    """The registers behind {a, b, ...}, or a single one, as Rows."""
    items = operand.items if isinstance(operand, Vec) else (operand,)
    get = machine.dst if writable else machine.src
    return [Rows(machine, get(o, typ, instr)) for o in items]


class Rows:
    """A register seen as (warps, 32), read and written for all warps or for chosen ones."""

    def __init__(self, machine, array):
        self.machine = machine
        whole = array if np.ndim(array) else np.full(machine.threads, array)
        self.rows = whole.reshape(-1, 32)

    def get(self, warps):
        return self.rows if self.machine.mask is True else self.rows[warps]

    def put(self, warps, values):
        self.rows[slice(None) if self.machine.mask is True else warps] = values


def _matrix_form(instr, mods):
    mods.need("sync")
    mods.flag("aligned")
    shape = mods.need("m8n8", "m16n16", "m8n16", "m16n8")
    count = int(mods.need("x1", "x2", "x4")[1:])
    transposed = mods.flag("trans")
    mods.need("shared", "shared::cta")
    typ = mods.type()
    mods.done()
    if shape != "m8n8" or typ != "b16":
        raise UnsupportedInstruction(f"only m8n8 matrices of b16 are implemented, not {shape}.{typ}", instr)
    return count, transposed


def _row_threads(machine, warps, count):
    """Threads whose addresses count: lane 8i + r gives row r of matrix i."""
    return (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)


@handles("ldmatrix")
def ldmatrix(machine, instr, mods, index):
    count, transposed = _matrix_form(instr, mods)
    d = registers(machine, instr.operands[0], "b32", instr, writable=True)
    where = access.address(machine, instr.operands[1], instr)

    def body():
        warps = machine.active_warps()
        threads = _row_threads(machine, warps, count)
        rows = access.load(machine, "shared", where(threads), 16, threads, instr, index)
        if transposed:
            halves = rows.view(np.uint16).reshape(-1, count, 8, 8).swapaxes(2, 3)
            words = np.ascontiguousarray(halves).view(np.uint32)
        else:
            words = rows.view(np.uint32)
        words = words.reshape(len(warps), count, 32)
        for i in range(count):
            d[i].put(warps, words[:, i])

    return collective(machine, index, body)


@handles("stmatrix")
def stmatrix(machine, instr, mods, index):
    count, transposed = _matrix_form(instr, mods)
    where = access.address(machine, instr.operands[0], instr)
    s = registers(machine, instr.operands[1], "b32", instr)

    def body():
        warps = machine.active_warps()
        words = np.empty((len(warps), count, 32), np.uint32)
        for i in range(count):
            words[:, i] = s[i].get(warps)
        if transposed:
            halves = words.view(np.uint16).reshape(len(warps), count, 8, 8).swapaxes(2, 3)
            words = np.ascontiguousarray(halves).view(np.uint32)
        threads = _row_threads(machine, warps, count)
        access.store(machine, "shared", where(threads), 16, threads, words.reshape(-1, 4), instr, index)

    return collective(machine, index, body)


@handles("movmatrix")
def movmatrix(machine, instr, mods, index):
    """Transpose one 8x8 matrix of b16 held across the warp."""
    mods.need("sync")
    mods.flag("aligned")
    mods.need("m8n8")
    mods.need("trans")
    mods.need("b16")
    mods.done()
    (d,) = registers(machine, instr.operands[0], "b32", instr, writable=True)
    (s,) = registers(machine, instr.operands[1], "b32", instr)

    def body():
        warps = machine.active_warps()
        halves = np.ascontiguousarray(s.get(warps)).view(np.uint16).reshape(-1, 8, 8).swapaxes(1, 2)
        d.put(warps, np.ascontiguousarray(halves).view(np.uint32).reshape(-1, 32))

    return collective(machine, index, body)


def decode_elements(words, typ):
    """float32 values of uint32 words: pairs of fp16/bf16 in order, or one tf32 whose 13 low bits don't count."""
    if typ == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32)
    codes = words.view(np.uint16)
    return rounding.half_to_f32(codes) if typ == "f16" else rounding.bf16_to_f32(codes)


@handles("mma")
def mma(machine, instr, mods, index):
    mods.need("sync")
    mods.flag("aligned")
    shape = mods.need("m16n8k16", "m16n8k8", "m16n8k4")
    mods.need("row")
    mods.need("col")
    d_type, a_type, b_type, c_type = (mods.type() for _ in range(4))
    mods.done()
    k = int(shape.rsplit("k", 1)[1])
    if a_type != b_type or (a_type, k) not in {
        ("f16", 16),
        ("f16", 8),
        ("bf16", 16),
        ("bf16", 8),
        ("tf32", 8),
        ("tf32", 4),
    }:
        raise UnsupportedInstruction(f"mma {shape} of {a_type} and {b_type} is not implemented", instr)
    if d_type != c_type or d_type not in ("f32", "f16"):
        raise UnsupportedInstruction(f"mma accumulating {c_type} into {d_type} is not implemented", instr)
    half_out = d_type == "f16"
    word = "b32" if half_out else "f32"
    d = registers(machine, instr.operands[0], word, instr, writable=True)
    a = registers(machine, instr.operands[1], "b32", instr)
    b = registers(machine, instr.operands[2], "b32", instr)
    c = registers(machine, instr.operands[3], word, instr)
    packed = 1 if a_type == "tf32" else 2
    # A register holds `packed` neighbours along k of one row; registers go first over rows g and g+8, then over k.
    steps = k // (4 * packed)
    if (len(a), len(b), len(d), len(c)) != (2 * steps, steps, *((2, 2) if half_out else (4, 4))):
        raise UnsupportedInstruction("wrong number of fragment registers", instr)

    def body():
        warps = machine.active_warps()
        n = len(warps)
        left = np.empty((n, 2, 8, 4, steps), np.uint32)
        for i, reg in enumerate(a):
            left[:, i % 2, :, :, i // 2] = reg.get(warps).reshape(n, 8, 4)
        right = np.empty((n, 8, 4, steps), np.uint32)
        for i, reg in enumerate(b):
            right[..., i] = reg.get(warps).reshape(n, 8, 4)
        # k is ordered (position, register, neighbour) on both sides, so no permutation is needed.
        left = decode_elements(left.reshape(-1), a_type).reshape(n, 16, k)
        right = decode_elements(right.reshape(-1), a_type).reshape(n, 8, k)
        product = np.matmul(left, right.swapaxes(1, 2)).reshape(n, 2, 8, 4, 2)
        _add_and_store(machine, d, c, product, warps, half_out)

    return collective(machine, index, body)


def _add_and_store(machine, d, c, product, warps, half_out):
    """d = c + product, where register 2r + e holds row g + 8r, column 2*position + e (fp16: register r, half e)."""
    n = len(warps)
    if not half_out:
        results = []
        for i, reg in enumerate(c):
            results.append(product[:, i // 2, :, :, i % 2].reshape(n, 32) + reg.get(warps))
        for reg, values in zip(d, results, strict=True):
            reg.put(warps, values)
        return
    results = []
    for i, reg in enumerate(c):
        old = np.ascontiguousarray(reg.get(warps)).view(np.float16).reshape(n, 8, 4, 2)
        total = (old.astype(np.float32) + product[:, i]).astype(np.float16)
        results.append(np.ascontiguousarray(total).view(np.uint32).reshape(n, 32))
    for reg, values in zip(d, results, strict=True):
        reg.put(warps, values)
