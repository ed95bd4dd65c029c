"""cvt: between integers, floats and packed halves, with every rounding mode and saturation (PTX ISA 9.7.9.22)."""

import numpy as np

from .. import rounding
from ..decode import handles
from ..errors import UnsupportedInstruction
from ..operands import NUMPY
from .floating import flush
from .integer import computed

INTEGER_ROUNDING = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
FLOAT_ROUNDING = ("rn", "rz", "rm", "rp", "rna")
FLOATS = ("f16", "bf16", "tf32", "f32", "f64")


@handles("cvt")
def cvt(machine, instr, mods, index):
    whole = mods.take(*INTEGER_ROUNDING)
    mode = mods.take(*FLOAT_ROUNDING, default="rn")
    ftz, sat, relu = mods.flag("ftz"), mods.flag("sat"), mods.flag("relu")
    satfinite = mods.flag("satfinite")
    to, origin = mods.type(), mods.type()
    mods.done()
    if satfinite and to not in ("tf32",):
        raise UnsupportedInstruction(".satfinite is not implemented for this type", instr)
    if to in ("f16x2", "bf16x2"):
        return _pair(machine, instr, to, origin, mode, relu)
    d = _destination(machine, instr, to)
    s = machine.src(instr.operands[1], origin, instr)
    if to not in FLOATS and origin not in FLOATS:
        return _integers(machine, d, s, to, sat)
    return computed(machine, d, lambda: _widen(_convert(s, origin, to, whole, mode, ftz, sat, relu), to, d))


def _destination(machine, instr, to):
    """The register itself: it may be wider than the type, and is then filled by extension."""
    width = machine.operands.width(instr.operands[0]) or NUMPY[to].itemsize
    if width > NUMPY[to].itemsize:
        return machine.dst(instr.operands[0], f"{'s' if to[0] == 's' else 'u'}{width * 8}", instr)
    return machine.dst(instr.operands[0], to, instr)


def _widen(values, to, d):
    return (
        values
        if values.dtype.itemsize == d.dtype.itemsize
        else values.view(f"u{values.dtype.itemsize}").astype(d.dtype)
    )


def _integers(machine, d, s, to, sat):
    if not sat:
        narrow = NUMPY[to]
        return computed(machine, d, lambda: s.astype(narrow).astype(d.dtype, copy=False))
    info = np.iinfo(NUMPY[to])

    def run():
        low = max(info.min, np.iinfo(s.dtype).min)
        high = min(info.max, np.iinfo(s.dtype).max)
        return np.clip(s, s.dtype.type(low), s.dtype.type(high)).astype(d.dtype)

    return computed(machine, d, run)


def _convert(s, origin, to, whole, mode, ftz, sat, relu):
    """Values of `origin` as the numpy representation of `to`."""
    if origin == "bf16":
        x = rounding.bf16_to_f32(s)
    elif origin == "tf32":
        x = np.asarray(s).view(np.float32)
    elif origin == "f16":
        x = np.asarray(s).astype(np.float32)
    else:
        x = np.asarray(s)
    if ftz and x.dtype == np.float32 and origin == "f32":
        x = flush(np.array(x))
    if whole and to in FLOATS:
        x = INTEGER_ROUNDING[whole](x)
    if sat and to in FLOATS:
        x = np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1))
    if relu:
        x = np.where(np.isnan(x), x, np.maximum(x, x.dtype.type(0)))
    if to not in FLOATS:
        return _to_integer(x, to, whole or "rzi")
    if x.dtype.kind in "iu":
        return _from_integer(x, to, mode)
    result = _to_float(x, to, mode)
    return flush(np.array(result)) if ftz and to == "f32" else result


def _to_float(x, to, mode):
    if to == "f64":
        return x.astype(np.float64)
    if to == "f32":
        return x if x.dtype == np.float32 else rounding.to_f32(x, mode)
    if to == "f16":
        h = rounding.to_f16(x, mode)
        return np.where(np.isnan(h), np.array(0x7FFF, np.uint16).view(np.float16), h)
    if x.dtype == np.float64:
        if mode != "rn" or to == "tf32":
            raise ValueError("f64 straight to bf16/tf32 other than rn")
        return rounding.f64_to_bf16(x)
    return rounding.f32_to_tf32(x, mode) if to == "tf32" else rounding.f32_to_bf16(x, mode)


def _from_integer(x, to, mode):
    """Integers up to 64 bits: float64 holds 32 bits exactly; wider ones are rounded to odd on the way."""
    if to == "f64":
        return x.astype(np.float64)
    wide = x.astype(np.float64)
    if x.dtype.itemsize == 8:
        low = (x & x.dtype.type(0x7FF)).astype(np.float64)
        wide = rounding.odd_sum((x & ~x.dtype.type(0x7FF)).astype(np.float64), low)
    if to == "f32":
        return rounding.to_f32(wide, mode)
    if to == "f16":
        return rounding.to_f16(wide, mode)
    return rounding.f64_to_bf16(wide)


def _to_integer(x, to, whole):
    """Out of range saturates; NaN gives 0 (the smallest-magnitude choice of the ISA for 32-bit and below)."""
    info = np.iinfo(NUMPY[to])
    y = INTEGER_ROUNDING[whole](x.astype(np.float64))
    nan = np.isnan(y)
    clipped = np.clip(np.where(nan, 0, y), float(info.min), float(info.max))
    top = clipped >= float(info.max)
    result = np.where(top, 0, clipped).astype(NUMPY[to])
    result = np.where(top, NUMPY[to].type(info.max), result)
    if info.bits == 64:  # 64-bit conversions of NaN give the top bit alone
        result = np.where(nan, np.array(1 << 63, np.uint64).view(NUMPY[to]), result)
    return result


def _pair(machine, instr, to, origin, mode, relu):
    """Two f32 to a packed pair: the first source becomes the upper half."""
    if origin != "f32":
        raise UnsupportedInstruction(f"cvt.{to}.{origin} is not implemented", instr)
    d = machine.dst(instr.operands[0], to, instr)
    high, low = (machine.src(o, "f32", instr) for o in instr.operands[1:3])

    def run():
        pair = np.empty((machine.threads, 2), np.float32)
        pair[:, 0], pair[:, 1] = low, high
        if relu:
            pair = np.where(np.isnan(pair), pair, np.maximum(pair, np.float32(0)))
        if to == "f16x2":
            h = rounding.to_f16(pair, mode)
            codes = np.where(np.isnan(h), np.uint16(0x7FFF), h.view(np.uint16))
        else:
            codes = rounding.f32_to_bf16(pair, mode)
        return np.ascontiguousarray(codes).view(np.uint32).reshape(-1)

    return computed(machine, d, run)
