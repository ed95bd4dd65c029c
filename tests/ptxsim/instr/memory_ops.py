"""ld, st, atom, red and fences (PTX ISA 9.7.9, 9.7.13). Vectors are one access of their whole width."""

import numpy as np

from .. import access
from ..decode import handles
from ..errors import UnsupportedInstruction
from ..operands import NUMPY
from ..parser import Vec, type_bytes
from . import half
from .mbarrier import mbarriers

STRONG = ("volatile", "relaxed", "acquire", "release", "acq_rel", "mmio")
SCOPES = ("cta", "cluster", "gpu", "sys")
SPACES = ("global", "shared", "shared::cta", "shared::cluster", "local", "param", "const")
HINTS = ("L1::", "L2::")


class _Form:
    """The modifiers all of ld/st/atom/red share. `.vec` elements of `.typ` make one access of `.width` bytes."""

    def __init__(self, instr, mods):
        self.ordered = mods.take("weak", *STRONG) not in (None, "weak")
        mods.take(*SCOPES)
        self.space = (mods.take(*SPACES) or "generic").split("::")[0]
        mods.take("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc")
        mods.flag("nc")
        mods.prefix(*HINTS)
        vec = mods.take("v2", "v4", "v8")
        self.vec = int(vec[1:]) if vec else 1
        self.typ = mods.type()
        self.width = type_bytes(self.typ) * self.vec

    def items(self, operand, instr):
        items = operand.items if isinstance(operand, Vec) else (operand,)
        if len(items) != self.vec:
            raise UnsupportedInstruction(f"{len(items)} registers for .v{self.vec}", instr)
        return items


@handles("ld", "ldu")
def ld(machine, instr, mods, index):
    form = _Form(instr, mods)
    mods.done()
    d, mem = instr.operands[:2]
    where = access.address(machine, mem, instr)
    writers = [_writer(machine, o, form.typ, instr) for o in form.items(d, instr)]
    element = np.dtype(f"u{type_bytes(form.typ)}")

    def run():
        threads = machine.active()
        raw = access.load(
            machine, form.space, where(threads), form.width, threads, instr, index, form.ordered
        )
        if form.vec == 1:
            writers[0](threads, raw)
            return
        columns = np.ascontiguousarray(raw).view(element).reshape(-1, form.vec)
        for i, write in enumerate(writers):
            write(threads, columns[:, i])

    return run


def _writer(machine, operand, typ, instr):
    """Puts loaded elements into a register that may be wider: extended by zeros, or by the sign for .s types."""
    width = machine.operands.width(operand) or type_bytes(typ)
    kind = "s" if typ[0] == "s" else "u"
    d = machine.dst(operand, f"{kind}{width * 8}", instr)
    element = np.dtype(f"{'i' if kind == 's' else 'u'}{type_bytes(typ)}")

    def write(threads, values):
        values = values if values.dtype == element else values.view(element)
        if threads is machine.everyone:
            d[...] = values
        else:
            d[threads] = values

    return write


@handles("st")
def st(machine, instr, mods, index):
    form = _Form(instr, mods)
    mods.done()
    mem, s = instr.operands[:2]
    where = access.address(machine, mem, instr)
    kind = f"u{8 * type_bytes(form.typ)}"
    sources = [machine.src(o, kind, instr) for o in form.items(s, instr)]
    element = np.dtype(f"u{type_bytes(form.typ)}")

    def run():
        threads = machine.active()
        columns = np.empty((len(threads), form.vec), element)
        for i, s in enumerate(sources):
            columns[:, i] = s if s.ndim == 0 or threads is machine.everyone else s[threads]
        values = columns.view(f"u{form.width}").reshape(-1) if form.width <= 8 else columns
        access.store(
            machine, form.space, where(threads), form.width, threads, values, instr, index, form.ordered
        )

    return run


INTEGER = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "exch": lambda old, new: new,
    "inc": lambda old, new: np.where(old >= new, 0, old + 1).astype(old.dtype),
    "dec": lambda old, new: np.where((old == 0) | (old > new), new, old - 1).astype(old.dtype),
}  # fmt: skip


@handles("atom", "red")
def atom(machine, instr, mods, index):
    if "async" in mods.left:
        raise UnsupportedInstruction("red.async is not implemented", instr)
    op = mods.need(*INTEGER, "cas")
    mods.flag("noftz")
    form = _Form(instr, mods)
    mods.done()
    operands = list(instr.operands)
    results = form.items(operands.pop(0), instr) if instr.op == "atom" else ()
    where = access.address(machine, operands[0], instr)
    sources = [form.items(o, instr) for o in operands[1 : 3 if op == "cas" else 2]]
    sources = [[machine.src(o, form.typ, instr) for o in items] for items in sources]
    writers = [_writer(machine, o, f"u{8 * type_bytes(form.typ)}", instr) for o in results]
    apply = _operation(op, form.typ)
    size = type_bytes(form.typ)

    def run():
        threads = machine.active()
        base = where(threads)
        for i in range(form.vec):
            args = [np.broadcast_to(s[i], machine.threads)[threads] for s in sources]
            old = _modify(machine, form, base + np.uint64(i * size), size, threads, args, apply, instr, index)
            if writers:
                writers[i](threads, old)

    return run


def _operation(op, typ):
    """old, *operands -> new, on arrays of the raw unsigned type."""
    kind = NUMPY[typ]
    raw = np.dtype(f"u{kind.itemsize}")
    if op == "cas":
        return lambda old, compare, new: np.where(old == compare.view(raw), new.view(raw), old)
    if typ in ("f16", "bf16", "f16x2", "bf16x2"):

        def add_half(old, new):
            total = np.add(*(np.asarray(half.as_float(v, typ), np.float32) for v in (old.view(kind), new)))
            if typ.startswith("bf16"):
                from .. import rounding

                return rounding.f32_to_bf16(total).view(raw)
            return total.astype(np.float16).view(raw)

        return add_half
    return lambda old, new: INTEGER[op](old.view(kind), new).view(raw)


def _modify(machine, form, addr, size, threads, args, apply, instr, index):
    """Read, change and write each address; threads that share one take turns. Returns the values each found."""
    found = np.empty(len(threads), f"u{size}")
    for turn in _turns(addr):
        a, t = addr[turn], threads[turn]
        old = access.load(machine, form.space, a, size, t, instr, index)
        found[turn] = old
        new = apply(old, *(x[turn] for x in args))
        _write_back(machine, form.space, a, size, t, new, instr, index)
    return found


def _write_back(machine, space, addr, size, threads, values, instr, index):
    """Atomics don't race with each other: in shared memory they are recorded as reads, not as writes."""
    if space != "shared":
        access.store(machine, space, addr, size, threads, values, instr, index)
        return
    off = machine.shared.offsets(addr, size, threads, instr)
    machine.shared.view(size)[off // size] = values


def _turns(addr):
    """Index arrays such that within each no address occurs twice, in thread order."""
    if len(np.unique(addr)) == len(addr):
        return [np.arange(len(addr))]
    order = np.argsort(addr, kind="stable")
    ordered = addr[order]
    first = np.r_[0, np.flatnonzero(np.diff(ordered)) + 1]
    rank = np.arange(len(addr)) - np.repeat(first, np.diff(np.r_[first, len(addr)]))
    return [np.sort(order[rank == r]) for r in range(rank.max() + 1)]


@handles("fence", "membar")
def fence(machine, instr, mods, index):
    """Order between threads comes from barriers; what is tracked is what asynchronous copies can see."""
    if "mbarrier_init" in mods.left:
        barriers = mbarriers(machine)
        return lambda: barriers.fence_init(machine.active())
    if "proxy" not in mods.left or not any(m.startswith("async") for m in mods.left):
        return lambda: None
    warps = machine.warps

    def run():
        active = machine.active_warps()
        machine.shared.races.fence_proxy(active // warps, active % warps)

    return run


@handles("createpolicy")
def createpolicy(machine, instr, mods, index):
    """A cache policy is a hint: any value will do."""
    d = machine.dst(instr.operands[0], "b64", instr)
    return lambda: machine.put(d, np.uint64(0))
