"""fp16 and bf16 arithmetic, scalar and packed (PTX ISA 9.7.4). Packed values are seen as twice as many scalars.

numpy's float16 arithmetic rounds once through float32, which is exact for + - * /; bf16 goes through float32 by
hand. fma rounds once: the sum is formed in float64 rounded to odd.
"""

import numpy as np

from .. import rounding
from ..errors import UnsupportedInstruction
from ..parser import Imm


def as_float(value, typ):
    """Numbers that numpy computes with: float16 for f16 forms, float32 for bf16 forms, itself otherwise."""
    if typ in ("bf16", "bf16x2"):
        codes = np.asarray(value)
        codes = np.atleast_1d(codes).view(np.uint16) if typ == "bf16x2" else codes
        return rounding.bf16_to_f32(codes)
    if typ == "f16x2":
        return np.atleast_1d(np.asarray(value)).view(np.float16)
    return value


class Form:
    """Modifiers, operands and the store of one f16/bf16 instruction."""

    def __init__(self, machine, instr, mods, typ, count):
        mods.take("rn")
        self.ftz, self.sat, self.relu = mods.flag("ftz"), mods.flag("sat"), mods.flag("relu")
        mods.done()
        self.machine, self.typ = machine, typ
        self.brain = typ.startswith("bf16")
        self.packed = typ.endswith("x2")
        self.d = machine.dst(instr.operands[0], typ, instr)
        self.sources = [machine.src(o, typ, instr) for o in instr.operands[1 : 1 + count]]
        if self.packed and any(isinstance(o, Imm) for o in instr.operands[1 : 1 + count]):
            self.sources = [np.full(machine.threads, s) if np.ndim(s) == 0 else s for s in self.sources]

    def values(self, wide=np.float32):
        """The sources as numbers in a type wide enough for the operation."""
        out = [np.asarray(as_float(s, self.typ)).astype(wide) for s in self.sources]
        return [_flush_half(x) for x in out] if self.ftz and not self.brain else out

    def store(self, wide):
        """Round float32/float64 numbers to the type and write them."""
        if self.sat:
            wide = np.where(np.isnan(wide), 0, np.clip(wide, 0, 1))
        if self.relu:
            wide = np.where(np.isnan(wide), wide, np.maximum(wide, 0))
        if self.brain:
            codes = rounding.f64_to_bf16(wide) if wide.dtype == np.float64 else rounding.f32_to_bf16(wide)
        else:
            h = wide.astype(np.float16)
            codes = np.where(np.isnan(h), 0x7FFF, (_flush_half(h) if self.ftz else h).view(np.uint16)).astype(
                np.uint16
            )
        self.put_codes(codes)

    def put_codes(self, codes):
        codes = np.ascontiguousarray(np.broadcast_to(codes, self.machine.threads * (2 if self.packed else 1)))
        self.machine.put(self.d, codes.view(self.d.dtype))


def _flush_half(x):
    return np.where(np.abs(x) < 2.0**-14, np.copysign(x.dtype.type(0), x), x)


def binary(machine, instr, mods, typ, function):
    form = Form(machine, instr, mods, typ, 2)
    return lambda: form.store(function(*form.values()))


def fma(machine, instr, mods, typ):
    form = Form(machine, instr, mods, typ, 3)

    def run():
        a, b, c = form.values(np.float64)
        form.store(rounding.odd_sum(*np.broadcast_arrays(a * b, c)))

    return run


def minmax(machine, instr, mods, typ, function):
    form = Form(machine, instr, mods, typ, 2)
    return lambda: form.store(function(*form.values()))


def unary(machine, instr, mods, typ, function):
    form = Form(machine, instr, mods, typ, 1)
    return lambda: form.store(function(form.values(np.float64)[0]))


def sign(machine, instr, mods, typ):
    """neg and abs flip or clear the sign bit of every half, NaN included."""
    form = Form(machine, instr, mods, typ, 1)
    if form.ftz:
        raise UnsupportedInstruction("neg/abs with .ftz on halves is not implemented", instr)

    def run():
        codes = np.ascontiguousarray(np.atleast_1d(form.sources[0])).view(np.uint16)
        form.put_codes(codes ^ np.uint16(0x8000) if instr.op == "neg" else codes & np.uint16(0x7FFF))

    return run
