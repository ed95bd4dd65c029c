"""f32, f64 and packed f32x2 arithmetic, and the approximate functions (PTX ISA 9.7.3).

rn results are correctly rounded, fma has one rounding. The .approx functions return the correctly rounded result
where hardware promises 1 to 2 ulp: a kernel must not depend on more than the promise, and this can't check that.
"""

import numpy as np

from .. import rounding
from ..decode import handles
from ..errors import UnsupportedInstruction
from ..parser import Reg
from . import half
from .integer import computed, ufunc

ROUNDINGS = ("rn", "rz", "rm", "rp")
HALVES = ("f16", "bf16", "f16x2", "bf16x2")
TINY = np.float32(2.0**-126)


def flush(x):
    """Subnormal float32 values to zero of their sign, in place."""
    x[...] = np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)
    return x


class _Form:
    """Modifiers and operands shared by all f32-like instructions: f32, f64, or f32x2 seen as pairs of f32."""

    def __init__(self, machine, instr, mods, typ, count):
        self.machine, self.typ = machine, typ
        self.mode = mods.take(*ROUNDINGS, default="rn")
        self.ftz, self.sat = mods.flag("ftz"), mods.flag("sat")
        mods.done()
        self.d = machine.dst(instr.operands[0], typ, instr)
        operands = instr.operands[1 : 1 + count]
        self.args = [machine.src(o, typ, instr) for o in operands]
        if typ == "f32x2":
            self.d = self.d.view(np.float32).reshape(-1, 2)
            self.args = [self._pairs(a) for a in self.args]
        self.plain = self.mode == "rn" and not self.ftz and not self.sat and typ != "f32x2"

    @staticmethod
    def _pairs(a):
        return (
            a.view(np.float32).reshape(-1, 2)
            if a.ndim
            else np.frombuffer(a.tobytes(), np.float32).reshape(1, 2)
        )

    def inputs(self):
        return [flush(np.array(a)) for a in self.args] if self.ftz and self.typ != "f64" else self.args

    def store(self, values):
        if self.ftz and self.typ != "f64":
            values = flush(np.array(values))
        if self.sat:
            values = np.where(np.isnan(values), values.dtype.type(0), np.clip(values, 0, 1))
        if self.typ == "f32x2" and self.machine.where is not True:
            np.copyto(self.d, values, where=self.machine.where[:, None])
        else:
            self.machine.put(self.d, values)


def _exact(function, args, mode, typ):
    """add, sub, mul, div in the type, or through float64 where the rounding isn't to nearest."""
    if mode == "rn":
        return function(*args)
    if typ == "f64":
        raise ValueError("directed rounding of f64")
    a, b = (np.asarray(x, np.float64) for x in args)
    if function is np.add or function is np.subtract:
        return rounding.to_f32(
            rounding.odd_sum(*np.broadcast_arrays(a, b if function is np.add else -b)), mode
        )
    return rounding.to_f32(function(a, b), mode)


def _binary(machine, instr, mods, typ, function):
    form = _Form(machine, instr, mods, typ, 2)
    if typ == "f64" and form.mode != "rn":
        raise UnsupportedInstruction("directed rounding of f64 is not implemented", instr)
    if form.plain:
        return ufunc(machine, instr, typ, function, 2)
    return lambda: form.store(_exact(function, form.inputs(), form.mode, typ))


def add_float(machine, instr, mods, typ):
    function = np.add if instr.op == "add" else np.subtract
    if typ in HALVES:
        return half.binary(machine, instr, mods, typ, function)
    return _binary(machine, instr, mods, typ, function)


def mul_float(machine, instr, mods, typ):
    if typ in HALVES:
        return half.binary(machine, instr, mods, typ, np.multiply)
    return _binary(machine, instr, mods, typ, np.multiply)


def div_float(machine, instr, mods, typ):
    mods.take("approx", "full")
    return _binary(machine, instr, mods, typ, np.divide)


@handles("fma")
def fma(machine, instr, mods, index):
    return fma_float(machine, instr, mods, mods.type())


def fma_float(machine, instr, mods, typ):
    if typ in HALVES:
        return half.fma(machine, instr, mods, typ)
    form = _Form(machine, instr, mods, typ, 3)
    if typ == "f64":
        if form.mode != "rn":
            raise UnsupportedInstruction("directed rounding of f64 is not implemented", instr)
        return lambda: form.store(_fma64(*form.inputs()))
    return lambda: form.store(rounding.fma32(*form.inputs(), form.mode))


def _fma64(a, b, c):
    """float64 fma by Dekker's product and two sums; the last rounding can double in rare ties."""
    a, b, c = np.broadcast_arrays(a, b, c)
    p = a * b
    split = 134217729.0
    ah, bh = a * split - (a * split - a), b * split - (b * split - b)
    al, bl = a - ah, b - bh
    e = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    s = p + c
    bb = s - p
    exact = s + (((p - (s - bb)) + (c - bb)) + e)
    return np.where(np.isfinite(exact), exact, p + c)


def minmax_float(machine, instr, mods, typ):
    nan, xorsign = mods.flag("NaN"), mods.flag("xorsign")
    if xorsign or mods.flag("abs"):
        raise UnsupportedInstruction("min/max with .xorsign.abs is not implemented", instr)
    least = instr.op == "min"
    function = (np.minimum if least else np.maximum) if nan else (np.fmin if least else np.fmax)
    if typ in HALVES:
        return half.minmax(machine, instr, mods, typ, function)
    count = len(instr.operands) - 1
    form = _Form(machine, instr, mods, typ, count)
    if form.plain and count == 2:
        return ufunc(machine, instr, typ, function, 2)

    def run():
        values = form.inputs()
        result = function(values[0], values[1])
        form.store(function(result, values[2]) if count == 3 else result)

    return run


def sign_float(machine, instr, mods, typ):
    if typ in HALVES:
        return half.sign(machine, instr, mods, typ)
    form = _Form(machine, instr, mods, typ, 1)
    function = np.negative if instr.op == "neg" else np.absolute
    return lambda: form.store(function(form.inputs()[0]))


def copysign_float(machine, instr, mods):
    typ = mods.type()
    mods.done()
    d = machine.dst(instr.operands[0], typ, instr)
    sign, magnitude = (machine.src(o, typ, instr) for o in instr.operands[1:3])
    return computed(machine, d, lambda: np.copysign(magnitude, sign))


APPROXIMATE = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: np.asarray(x).dtype.type(1) / x,
    "rsqrt": lambda x: np.asarray(x).dtype.type(1) / np.sqrt(x),
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@handles(*APPROXIMATE)
def approximate(machine, instr, mods, index):
    mods.take("approx", "full")
    typ = mods.type()
    function = APPROXIMATE[instr.op]
    if typ in HALVES:
        return half.unary(machine, instr, mods, typ, function)
    form = _Form(machine, instr, mods, typ, 1)

    def run():
        x = form.inputs()[0]
        if form.typ == "f64":
            return form.store(function(x))
        exact = function(np.asarray(x, np.float64))
        return form.store(rounding.to_f32(exact, form.mode))

    def run_fast():
        form.store(np.exp2(form.inputs()[0]))

    # exp2 dominates attention kernels, and numpy's float32 version is within 1 ulp, as the hardware's 2 ulp.
    return run_fast if instr.op == "ex2" else run


@handles("testp")
def testp(machine, instr, mods, index):
    kind = mods.need("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    typ = mods.type()
    mods.done()
    d = machine.dst(instr.operands[0], "pred", instr)
    x = machine.src(instr.operands[1], typ, instr)
    tiny = np.finfo(np.asarray(x).dtype).tiny
    tests = {
        "finite": lambda: np.isfinite(x),
        "infinite": lambda: np.isinf(x),
        "number": lambda: ~np.isnan(x),
        "notanumber": lambda: np.isnan(x),
        "normal": lambda: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda: (x != 0) & (np.abs(x) < tiny),
    }
    if not isinstance(instr.operands[1], Reg):
        raise UnsupportedInstruction("testp of a constant is not implemented", instr)
    return computed(machine, d, tests[kind])
