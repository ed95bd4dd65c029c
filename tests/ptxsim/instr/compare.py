"""mov, setp, set, selp, slct, cvta, mapa (PTX ISA 9.7.6, 9.7.9)."""

import numpy as np

from .. import layout
from ..decode import handles
from ..errors import UnsupportedInstruction
from ..operands import NUMPY
from ..parser import Pair, Vec
from .half import as_float

COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    "equ": np.equal, "neu": np.not_equal, "ltu": np.less, "leu": np.less_equal, "gtu": np.greater, "geu": np.greater_equal,
}  # fmt: skip
UNORDERED = ("equ", "neu", "ltu", "leu", "gtu", "geu")
COMPARISONS = (*COMPARE, "num", "nan")
FLOATS = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f64")


@handles("mov")
def mov(machine, instr, mods, index):
    typ = mods.type()
    mods.done()
    d, s = instr.operands
    if isinstance(s, Vec):
        return _pack(machine, instr, typ, d, s)
    if isinstance(d, Vec):
        return _unpack(machine, instr, typ, d, s)
    d, s = machine.dst(d, typ, instr), machine.src(s, typ, instr)

    def run():
        if machine.where is True:
            d[...] = s
        else:
            np.copyto(d, s, where=machine.where)

    return run


def _piece(vec, typ):
    bits = NUMPY[typ].itemsize * 8 // len(vec.items)
    return f"b{bits}", bits


def _pack(machine, instr, typ, d, vec):
    piece, _ = _piece(vec, typ)
    d = machine.dst(d, typ, instr).view(NUMPY[piece]).reshape(-1, len(vec.items))
    parts = [machine.src(o, piece, instr) for o in vec.items]

    def run():
        # Read all before writing any: the destination may be among the sources.
        values = [np.copy(p) for p in parts]
        for i, v in enumerate(values):
            machine.put(d[:, i], v)

    return run


def _unpack(machine, instr, typ, vec, s):
    piece, _ = _piece(vec, typ)
    s = machine.src(s, typ, instr)
    parts = [machine.dst(o, piece, instr) for o in vec.items]

    def run():
        values = np.broadcast_to(s, machine.threads).copy().view(NUMPY[piece]).reshape(-1, len(parts))
        for i, p in enumerate(parts):
            machine.put(p, values[:, i])

    return run


@handles("setp", "set")
def setp(machine, instr, mods, index):
    test = mods.need(*COMPARISONS)
    combine = mods.take("and", "or", "xor")
    mods.flag("ftz")
    types = [mods.type()]
    if instr.op == "set":
        types.append(mods.type())
    mods.done()
    typ = types[-1]
    first, second = instr.operands[0], None
    if isinstance(first, Pair):
        first, second = first.first, first.second
    a, b = (machine.src(o, typ, instr) for o in instr.operands[1:3])
    result = _test(test, typ, a, b, "ftz" in instr.mods)
    if combine:
        function = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combine]
        third = machine.operands.predicate(instr.operands[3], instr)
    if instr.op == "set":
        return _set(machine, instr, types[0], first, result, (function, third) if combine else None)
    if typ in ("f16x2", "bf16x2"):
        p, q = machine.dst(first, "pred", instr), machine.dst(second, "pred", instr)

        def run_pair():
            both = result().reshape(-1, 2)
            for d, bit in ((p, both[:, 0]), (q, both[:, 1])):
                machine.put(d, function(bit, third()) if combine else bit)

        return run_pair
    p = machine.dst(first, "pred", instr)
    if second is None and not combine:
        ufunc = COMPARE.get(test)
        plain = test not in UNORDERED and typ != "bf16" and not (test == "ne" and typ in FLOATS)
        if ufunc and plain and "ftz" not in instr.mods:

            def compare():
                ufunc(a, b, out=p, where=machine.where)

            return compare
        return lambda: machine.put(p, result())
    q = None if second is None else machine.dst(second, "pred", instr)

    def run():
        yes = np.broadcast_to(result(), machine.threads)
        no = ~yes
        if combine:
            other = third()
            yes, no = function(yes, other), function(no, other)
        machine.put(p, yes)
        if q is not None:
            machine.put(q, no)

    return run


def _test(test, typ, a, b, ftz):
    """A callable giving the comparison; the unordered forms are true when either side is NaN."""
    is_float = typ in FLOATS

    def run():
        x, y = (as_float(a, typ), as_float(b, typ)) if is_float else (a, b)
        if ftz and typ == "f32":
            from .floating import flush

            x, y = flush(np.array(x)), flush(np.array(y))
        if test == "num":
            return ~(np.isnan(x) | np.isnan(y))
        if test == "nan":
            return np.isnan(x) | np.isnan(y)
        r = COMPARE[test](x, y)
        if is_float and test == "ne":  # ordered: false for NaN, unlike numpy's
            return r & ~(np.isnan(x) | np.isnan(y))
        return r | np.isnan(x) | np.isnan(y) if test in UNORDERED else r

    return run


def _set(machine, instr, out, first, result, combine):
    d = machine.dst(first, out, instr)

    def run():
        yes = np.broadcast_to(result(), (machine.threads * (2 if out in ("f16x2", "bf16x2") else 1),))
        if combine:
            yes = combine[0](yes, combine[1]())
        if out == "f32":
            machine.put(d, yes.astype(np.float32))
        elif out in ("f16x2", "bf16x2"):
            one = 0x3C00 if out == "f16x2" else 0x3F80
            machine.put(d, np.where(yes, one, 0).astype(np.uint16).view(np.uint32))
        elif out in ("f16", "bf16"):
            machine.put(
                d, np.where(yes, 0x3C00 if out == "f16" else 0x3F80, 0).astype(np.uint16).view(d.dtype)
            )
        else:
            machine.put(d, -yes.astype(d.dtype))

    return run


@handles("selp")
def selp(machine, instr, mods, index):
    typ = mods.type()
    mods.done()
    d = machine.dst(instr.operands[0], typ, instr)
    a, b = (machine.src(o, typ, instr) for o in instr.operands[1:3])
    p = machine.operands.predicate(instr.operands[3], instr)
    return lambda: machine.put(d, np.where(p(), a, b))


@handles("slct")
def slct(machine, instr, mods, index):
    mods.flag("ftz")
    typ, sign = mods.type(), mods.type()
    mods.done()
    d = machine.dst(instr.operands[0], typ, instr)
    a, b = (machine.src(o, typ, instr) for o in instr.operands[1:3])
    c = machine.src(instr.operands[3], sign, instr)
    return lambda: machine.put(d, np.where(c >= 0, a, b))


@handles("cvta")
def cvta(machine, instr, mods, index):
    to = mods.flag("to")
    space = mods.need("global", "shared", "shared::cta", "shared::cluster", "local", "const", "param")
    typ = mods.type()
    mods.done()
    d = machine.dst(instr.operands[0], typ, instr)
    s = machine.src(instr.operands[1], typ, instr)
    base = layout.window(space)
    if not base:
        return lambda: machine.put(d, s)
    base = np.uint64(base)
    return lambda: machine.put(d, s - base if to else s + base)


@handles("isspacep")
def isspacep(machine, instr, mods, index):
    space = mods.need("global", "shared", "shared::cta", "shared::cluster", "local", "const")
    mods.done()
    d, s = machine.dst(instr.operands[0], "pred", instr), machine.src(instr.operands[1], "u64", instr)
    return lambda: machine.put(d, layout.in_window(s, space))


@handles("mapa", "getctarank")
def mapa(machine, instr, mods, index):
    raise UnsupportedInstruction("thread block clusters of more than one block are not modelled", instr)
