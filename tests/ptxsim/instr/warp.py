"""shfl, vote, match, redux, activemask, elect, bar.warp.sync's kin (PTX ISA 9.7.9, 9.7.13)."""

import numpy as np

from ..decode import handles
from ..errors import UnsupportedInstruction
from ..parser import Pair


def collective(machine, index, body, member=None, span=32):
    """Run body once each warp's living threads (those in `member`, if given) have all arrived."""
    from ..machine import RESCHEDULE

    def run():
        return body() if machine.converge(index, member, span) else RESCHEDULE

    return run


@handles("shfl")
def shfl(machine, instr, mods, index):
    mods.need("sync")
    mode = mods.need("up", "down", "bfly", "idx")
    typ = mods.type()
    mods.done()
    d, p = instr.operands[0], None
    if isinstance(d, Pair):
        d, p = d.first, machine.dst(d.second, "pred", instr)
    d = machine.dst(d, typ, instr)
    a = machine.src(instr.operands[1], typ, instr)
    b, c = (machine.src(o, "u32", instr) for o in instr.operands[2:4])
    lane = machine.lane_of.astype(np.int64)
    base = machine.everyone - lane

    def lookup():
        """Source lane and validity, from the ISA's pseudocode: c packs the segment mask and the clamp."""
        amount, clamp, segment = ((np.asarray(x).astype(np.int64)) for x in (b & 31, c & 31, (c >> 8) & 31))
        limit = (lane & segment) | (clamp & ~segment)
        j = {
            "up": lambda: lane - amount,
            "down": lambda: lane + amount,
            "bfly": lambda: lane ^ amount,
            "idx": lambda: (lane & segment) | (amount & ~segment),
        }[mode]()
        valid = j >= limit if mode == "up" else j <= limit
        return base + np.where(valid, j, lane), valid

    member = machine.src(instr.operands[4], "u32", instr)
    fixed = lookup() if np.ndim(b) == 0 and np.ndim(c) == 0 else None

    def body():
        source, valid = fixed or lookup()
        values = np.broadcast_to(a, machine.threads)[source]
        machine.put(d, values)
        if p is not None:
            machine.put(p, valid)

    return collective(machine, index, body, member)


@handles("vote")
def vote(machine, instr, mods, index):
    mods.need("sync")
    kind = mods.need("all", "any", "uni", "ballot")
    typ = mods.type()
    mods.done()
    d = machine.dst(instr.operands[0], typ, instr)
    p = machine.operands.predicate(instr.operands[1], instr)
    member = machine.src(instr.operands[2], "u32", instr)

    def body():
        inside, yes = _votes(machine, member, p())
        if kind == "ballot":
            bits = (yes.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
            result = np.repeat(bits, 32)
        else:
            every, some = (yes | ~inside).all(1), yes.any(1)
            result = np.repeat({"all": every, "any": some, "uni": every | ~some}[kind], 32)
        machine.put(d, result)

    return collective(machine, index, body, member)


def _votes(machine, member, p):
    """(warps, 32): which lanes take part, and which of them say yes."""
    lanes = np.uint32(1) << machine.lane_of.astype(np.uint32)
    inside = ((np.broadcast_to(member, machine.threads) & lanes) != 0) & machine.mask_array()
    return inside.reshape(-1, 32), (inside & p).reshape(-1, 32)


@handles("match")
def match(machine, instr, mods, index):
    kind = mods.need("any", "all")
    mods.need("sync")
    typ = mods.type()
    mods.done()
    d, p = instr.operands[0], None
    if isinstance(d, Pair):
        d, p = d.first, machine.dst(d.second, "pred", instr)
    d = machine.dst(d, "b32", instr)
    a = machine.src(instr.operands[1], typ, instr)
    member = machine.src(instr.operands[2], "u32", instr)

    def body():
        inside, _ = _votes(machine, member, True)
        values = np.broadcast_to(a, machine.threads).reshape(-1, 32)
        same = (values[:, :, None] == values[:, None, :]) & inside[:, None, :]
        bits = (same.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(2).astype(np.uint32)
        if kind == "all":
            agree = (same | ~inside[:, None, :]).all(2)
            bits = np.where(agree, bits, 0).astype(np.uint32)
            if p is not None:
                machine.put(p, agree.reshape(-1))
        machine.put(d, bits.reshape(-1))

    return collective(machine, index, body, member)


REDUCE = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor
}  # fmt: skip


@handles("redux")
def redux(machine, instr, mods, index):
    mods.need("sync")
    op = mods.need(*REDUCE)
    typ = mods.type()
    mods.done()
    if typ == "f32":
        raise UnsupportedInstruction("redux of f32 is not implemented", instr)
    d, a = machine.dst(instr.operands[0], typ, instr), machine.src(instr.operands[1], typ, instr)
    member = machine.src(instr.operands[2], "u32", instr)
    info = np.iinfo(d.dtype)
    identity = {"add": 0, "or": 0, "xor": 0, "and": -1, "min": info.max, "max": info.min}[op]
    identity = np.array(identity, np.int64).astype(d.dtype)

    def body():
        inside, _ = _votes(machine, member, True)
        values = np.where(inside, np.broadcast_to(a, machine.threads).reshape(-1, 32), identity)
        machine.put(d, np.repeat(REDUCE[op].reduce(values, axis=1).astype(d.dtype), 32))

    return collective(machine, index, body, member)


@handles("activemask")
def activemask(machine, instr, mods, index):
    mods.type()
    mods.done()
    d = machine.dst(instr.operands[0], "b32", instr)

    def run():
        _, yes = _votes(machine, np.uint32(0xFFFFFFFF), machine.mask_array())
        bits = (yes.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1).astype(np.uint32)
        machine.put(d, np.repeat(bits, 32))

    return run


@handles("elect")
def elect(machine, instr, mods, index):
    """elect.sync d|p, membermask: the lowest member lane is the leader."""
    mods.need("sync")
    mods.done()
    pair = instr.operands[0]
    d, p = machine.dst(pair.first, "b32", instr), machine.dst(pair.second, "pred", instr)
    member = machine.src(instr.operands[1], "u32", instr)

    def body():
        inside, _ = _votes(machine, member, True)
        leader = np.repeat(inside.argmax(1), 32)
        machine.put(d, leader.astype(np.uint32))
        machine.put(p, machine.lane_of == leader)

    return collective(machine, index, body, member)
