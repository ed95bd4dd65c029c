"""cp.async.bulk and cp.async.bulk.tensor (TMA) in both directions, tensormap.replace and its copy to global memory
(PTX ISA 9.7.9.25.4 to .6, 9.7.9.27). Loads arrive on an mbarrier, stores belong to bulk groups."""

import struct

import numpy as np

from .. import access, tensormap
from ..decode import handles
from ..descriptors import swizzle
from ..errors import MemoryFault, UnsupportedInstruction
from ..operands import NUMPY
from ..parser import Imm, Mem
from ..pending import Groups, PendingReads
from .mbarrier import mbarriers

SHARED = ("shared::cta", "shared::cluster")
DIMENSIONS = ("1d", "2d", "3d", "4d", "5d")


class Bulk:
    """Bulk groups of each thread, with the reads of shared memory their stores still make."""

    def __init__(self, machine):
        self.groups = Groups(machine)
        self.reads = PendingReads(machine, self.groups)


def bulk(machine, instr, mods, index):
    """The part of cp.async.bulk behind its first two modifiers."""
    if not hasattr(machine, "bulk"):
        machine.bulk = Bulk(machine)
    state = machine.bulk
    if mods.flag("commit_group"):
        mods.done()
        return state.groups.commit
    if mods.flag("wait_group"):
        mods.flag("read")
        mods.done()
        pending = instr.operands[0].value
        return lambda: state.reads.wait(pending)
    tensor = mods.flag("tensor")
    if mods.flag("prefetch"):
        return lambda: None
    dimensions = mods.need(*DIMENSIONS) if tensor else None
    first, second = mods.need(*SHARED, "global"), mods.need(*SHARED, "global")
    mods.flag("tile")
    mods.flag("weak")
    mods.prefix("L2::")
    if first == "global":
        mods.need("bulk_group")
        mods.done()
        return _store(machine, instr, state, index, int(dimensions[0]) if tensor else None)
    if second != "global":
        raise UnsupportedInstruction("bulk copies between blocks of a cluster are not modelled", instr)
    mods.need("mbarrier::complete_tx::bytes")
    mods.done()
    return _load(machine, instr, index, int(dimensions[0]) if tensor else None)


class _Side:
    """One thread's end of a copy: shared byte offsets of elements, and their global addresses."""

    def __init__(self, off, address, inside, element, nan=False):
        self.off, self.address, self.inside, self.element, self.nan = off, address, inside, element, nan


def _plan(machine, instr, dimensions, shared_mem, global_mem, size):
    """A callable planning the copy of one thread: tensor copies by their map, plain ones as 16-byte pieces."""
    to = access.address(machine, shared_mem, instr)
    origin = access.address(machine, Mem(global_mem.base, global_mem.offset), instr)
    if dimensions is None:
        length = machine.src(size, "u32", instr)
        return lambda thread: _flat(machine, instr, thread, to, origin, length)
    coords = [machine.src(c, "s32", instr) for c in global_mem.coords[0].items]
    if len(coords) != dimensions:
        raise UnsupportedInstruction(f"{len(coords)} coordinates for {dimensions} dimensions", instr)

    def plan(thread):
        one = np.array([thread])
        raw = _map_bytes(machine, origin(one)[0], one, instr)
        at = [int(np.broadcast_to(c, machine.threads)[thread]) for c in coords]
        try:
            box, width = tensormap.box(raw, at)
        except ValueError as e:
            raise UnsupportedInstruction(str(e), instr) from e
        base = int(to(one)[0])
        if base % 128:
            raise MemoryFault(
                f"a tensor copy's shared address must be a multiple of 128, not {base:#x}", instr
            )
        local = swizzle(base + box.local, width)
        chunks = np.unique(local // 16) * 16
        machine.shared.offsets(chunks, 16, np.full(len(chunks), thread), instr)
        off = machine.shared.offsets(local, box.element, np.full(len(local), thread), instr)
        return _Side(off, box.address, box.inside, box.element, box.nan)

    return plan


def _flat(machine, instr, thread, to, origin, length):
    one = np.array([thread])
    n = int(np.broadcast_to(length, machine.threads)[thread])
    if n % 16:
        raise MemoryFault(f"a bulk copy's size must be a multiple of 16, not {n}", instr)
    steps = np.arange(0, n, 16)
    off = machine.shared.offsets(to(one).astype(np.int64)[0] + steps, 16, np.full(len(steps), thread), instr)
    return _Side(off, origin(one)[0] + steps.astype(np.uint64), np.ones(len(steps), bool), 16)


def _map_bytes(machine, addr, thread, instr):
    """The 128 bytes behind a generic address in global or parameter memory."""
    if addr % np.uint64(64):
        raise MemoryFault(f"a tensor map must lie at a multiple of 64, not at {int(addr):#x}", instr)
    at = addr + np.arange(0, tensormap.BYTES, 8, dtype=np.uint64)
    return access.load(machine, "generic", at, 8, np.repeat(thread, len(at)), instr, 0).tobytes()


def _load(machine, instr, index, dimensions):
    shared_mem, global_mem = instr.operands[:2]
    barrier_mem = instr.operands[2 if dimensions else 3]
    plan = _plan(machine, instr, dimensions, shared_mem, global_mem, instr.operands[2])
    barrier = access.address(machine, barrier_mem, instr)
    state = mbarriers(machine)

    def run():
        for thread in machine.active():
            side = plan(thread)
            block = int(machine.block_of[thread])
            addr = int(barrier(np.array([thread]))[0])
            one = np.array([thread])
            machine.shared.note_read(machine.shared.offsets(np.array([addr]), 8, one, instr), 8, one, instr)
            obj = state.use_by_copy(block, addr, instr)
            data = np.zeros(len(side.off), f"V{side.element}")
            if side.nan:
                data[:] = np.full(1, _nan(side.element)).view(data.dtype)
            who = np.full(int(side.inside.sum()), thread)
            raw = access.load(machine, "global", side.address[side.inside], side.element, who, instr, index)
            data[side.inside] = np.ascontiguousarray(raw).view(data.dtype).reshape(-1)
            rows = np.unique(side.off // 16) * 16
            machine.shared.start_copy(rows, 16, np.full(len(rows), thread), index, instr)
            obj.late.append(_Arrival(machine, state, obj, block, side, data, rows))

    return run


def _nan(element):
    return np.array({2: 0x7FFF, 4: 0x7FFFFFFF, 8: 0x7FFFFFFFFFFFFFFF}[element], f"u{element}")


class _Arrival:
    """A copy in flight, to be called when it arrives."""

    def __init__(self, machine, state, obj, block, side, data, rows):
        self.machine, self.state, self.obj, self.block = machine, state, obj, block
        self.side, self.data, self.rows = side, data, rows

    def __call__(self):
        shared, side = self.machine.shared, self.side
        view = shared.view(side.element)
        at = side.off // side.element
        view[at] = (
            self.data.view(np.uint8).reshape(-1, 16) if side.element == 16 else self.data.view(view.dtype)
        )
        clock = shared.races.deliver(self.rows // 16, 16, self.block)
        self.state.complete_tx(self.obj, len(side.off) * side.element, clock)


def _store(machine, instr, state, index, dimensions):
    global_mem, shared_mem = instr.operands[:2]
    plan = _plan(
        machine, instr, dimensions, shared_mem, global_mem, instr.operands[2] if not dimensions else None
    )

    def run():
        for thread in machine.active():
            side = plan(thread)
            rows = np.unique(side.off // 16) * 16
            state.reads.note(rows, np.full(len(rows), thread), instr)
            inside = side.inside
            values = machine.shared.load(side.off[inside], side.element)
            who = np.full(int(inside.sum()), thread)
            access.store(machine, "global", side.address[inside], side.element, who, values, instr, index)

    return run


@handles("tensormap")
def tensormap_op(machine, instr, mods, index):
    if mods.flag("cp_fenceproxy"):
        return _publish(machine, instr, index)
    mods.need("replace")
    mods.need("tile")
    name = mods.need(*tensormap.FIELDS)
    space = (mods.take("shared::cta", "global") or "generic").split("::")[0]
    mods.need("b1024")
    typ = mods.need("b32", "b64")
    mods.done()
    offset, code, count = tensormap.FIELDS[name]
    ordinal = instr.operands[1] if count > 1 else Imm(0)
    value = machine.src(instr.operands[-1], typ, instr)
    size = struct.calcsize(code)
    element = NUMPY[f"u{8 * size}"]
    where = access.address(machine, instr.operands[0], instr)

    def run():
        threads = machine.active()
        values = np.broadcast_to(value, machine.threads)[threads].astype(element)
        at = where(threads) + np.uint64(offset + ordinal.value * size)
        access.store(machine, space, at, size, threads, values, instr, index)

    return run


def _publish(machine, instr, index):
    """tensormap.cp_fenceproxy: a warp copies a map from shared to global memory; its first lane does it here."""
    to = access.address(machine, instr.operands[0], instr)
    origin = access.address(machine, instr.operands[1], instr)

    def run():
        for warp in machine.active_warps():
            one = np.array([warp * 32])
            steps = np.arange(0, tensormap.BYTES, 4, dtype=np.uint64)
            who = np.repeat(one, len(steps))
            words = access.load(machine, "shared", origin(one)[0] + steps, 4, who, instr, index)
            access.store(machine, "global", to(one)[0] + steps, 4, who, words, instr, index)

    return run
