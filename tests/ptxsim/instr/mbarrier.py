"""mbarrier objects: phases that complete when all arrivals and all transaction bytes are in (PTX ISA 9.7.13.15).

A failed try_wait parks the thread until the phase completes. Asynchronous work that arrives on an mbarrier does so
as late as it can: when somebody asks for the phase, or when nobody else can run.
"""

from dataclasses import dataclass, field

import numpy as np

from .. import access
from ..decode import handles
from ..errors import MemoryFault, PtxError, RaceFault, UnsupportedInstruction
from ..parser import SINK, Reg


@dataclass
class Object:
    """One mbarrier: `known` is what its arrivals ordered before them, `done` that of completed phases."""

    expected: int
    pending: int
    known: np.ndarray
    done: np.ndarray
    tx: int = 0
    phase: int = 0
    late: list = field(default_factory=list)
    # Who initialised it, when, and whether that thread made it visible to copies.
    thread: int = 0
    clock: int = 0
    fenced: bool = False
    waiting: list = field(default_factory=list)


class MBarriers:
    def __init__(self, machine):
        self.machine, self.objects = machine, {}
        machine.hooks_reset.append(self.objects.clear)
        machine.hooks_stuck.append(self.deliver_awaited)

    def find(self, block, addr, instr):
        obj = self.objects.get((block, addr))
        if obj is None:
            raise MemoryFault(f"no mbarrier is initialised at shared address {addr:#x}", instr)
        return obj

    def arrive(self, obj, block, warp, count, instr):
        """`count` arrivals by a warp, which passes on what it knows."""
        races = self.machine.shared.races
        np.maximum(obj.known, races.release(block, warp), out=obj.known)
        obj.pending -= count
        if obj.pending < 0:
            raise PtxError(
                f"{-obj.pending} more arrivals than the {obj.expected} this mbarrier expects", instr
            )
        self.advance(obj)

    def fence_init(self, threads):
        """fence.mbarrier_init by these threads: each one's own barriers become visible to bulk copies."""
        for obj in self.objects.values():
            obj.fenced |= obj.thread in threads

    def use_by_copy(self, block, addr, instr):
        """The object that a bulk copy will arrive on, which must be visible to it."""
        obj, races = self.find(block, addr, instr), self.machine.shared.races
        warp = self.machine.warp_of[obj.thread]
        if races.enabled and not obj.fenced and races.fenced[block, warp] < obj.clock:
            raise RaceFault(
                f"the mbarrier at {addr:#x} was initialised by {self.machine.thread_name(obj.thread)}; neither "
                "fence.mbarrier_init nor fence.proxy.async makes that visible to this copy",
                instr,
            )
        return obj

    def complete_tx(self, obj, count, clock):
        """An asynchronous copy of `count` bytes has arrived at the asynchronous agent's time `clock`."""
        obj.known[-1] = max(obj.known[-1], clock)
        obj.tx -= count
        self.advance(obj)

    def advance(self, obj):
        from ..machine import RUN

        if obj.pending or obj.tx:
            return
        obj.phase ^= 1
        obj.pending = obj.expected
        np.maximum(obj.done, obj.known, out=obj.done)
        for threads in obj.waiting:
            self.machine.status[threads] = RUN
        obj.waiting = []

    def deliver(self, obj):
        """Let everything asynchronous that is due on this object arrive."""
        late, obj.late = obj.late, []
        for arrive in late:
            arrive()

    def deliver_awaited(self):
        """Nobody can run: time for what the waiting threads wait for. Returns whether anything arrived."""
        some = False
        for obj in list(self.objects.values()):
            if obj.waiting and obj.late:
                some = True
                self.deliver(obj)
        return some


def mbarriers(machine):
    if not hasattr(machine, "mbarriers"):
        machine.mbarriers = MBarriers(machine)
    return machine.mbarriers


SPACES = ("shared", "shared::cta")


@handles("mbarrier")
def mbarrier(machine, instr, mods, index):
    kind = mods.need(
        "init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx", "test_wait", "try_wait"
    )
    expect = kind == "arrive" and mods.flag("expect_tx")
    parity = mods.flag("parity")
    mods.take("release", "acquire", "relaxed")
    mods.take("cta", "cluster")
    if mods.take("shared::cluster"):
        raise UnsupportedInstruction("mbarriers of another block are not modelled", instr)
    mods.take(*SPACES)
    mods.take("b64")
    mods.done()
    state = mbarriers(machine)
    if kind in ("arrive_drop", "complete_tx"):
        raise UnsupportedInstruction(f"mbarrier.{kind} is not implemented", instr)
    if kind in ("test_wait", "try_wait"):
        return _wait(machine, instr, state, kind == "try_wait", parity, index)
    operands = list(instr.operands)
    result = operands.pop(0) if kind == "arrive" else None
    if result is not None and result != SINK and isinstance(result, Reg):
        raise UnsupportedInstruction("mbarrier state tokens are not modelled: wait by parity", instr)
    each = _each(machine, operands[0], instr)
    count = machine.src(operands[1], "u32", instr) if len(operands) > 1 else np.uint32(1)

    def init():
        for block, addr, threads, off in each():
            if len(threads) > 1 or (block, addr) in state.objects:
                raise PtxError(
                    f"mbarrier at {addr:#x} initialised twice in block {block} of the group", instr
                )
            n = int(np.broadcast_to(count, machine.threads)[threads[0]])
            machine.shared.store(off[:1], 8, threads[:1], np.zeros(1, np.uint64), index, instr)
            known = np.zeros(machine.warps + 1, np.int64)
            obj = state.objects[block, addr] = Object(n, n, known, known.copy(), thread=int(threads[0]))
            obj.clock = int(machine.shared.races.clock[block, machine.warp_of[obj.thread]])

    def invalidate():
        for block, addr, threads, off in each():
            state.find(block, addr, instr)
            machine.shared.store(off[:1], 8, threads[:1], np.full(1, ~np.uint64(0)), index, instr)
            del state.objects[block, addr]

    def arrive():
        for block, addr, threads, off in each():
            machine.shared.note_read(off, 8, threads, instr)
            obj = state.find(block, addr, instr)
            amounts = np.broadcast_to(count, machine.threads)[threads].astype(np.int64)
            if expect or kind == "expect_tx":
                obj.tx += int(amounts.sum())
                amounts = np.ones_like(amounts)
            if kind == "expect_tx":
                continue
            warps = machine.warp_of[threads]
            for warp in np.unique(warps):
                state.arrive(obj, block, warp, int(amounts[warps == warp].sum()), instr)

    return {"init": init, "inval": invalidate}.get(kind, arrive)


def _each(machine, mem, instr):
    """A callable listing (block, address, threads, offsets) of each mbarrier that active threads name."""
    where = access.address(machine, mem, instr)

    def run():
        threads = machine.active()
        addr = where(threads).astype(np.int64)
        off = machine.shared.offsets(addr, 8, threads, instr)
        for start in np.unique(off):
            mine = off == start
            first = threads[mine][0]
            yield int(machine.block_of[first]), int(addr[mine][0]), threads[mine], off[mine]

    return run


def _wait(machine, instr, state, blocking, parity, index):
    from ..machine import AT_MBARRIER, RESCHEDULE

    if not parity:
        raise UnsupportedInstruction("mbarrier state tokens are not modelled: wait by parity", instr)
    d = machine.dst(instr.operands[0], "pred", instr)
    each = _each(machine, instr.operands[1], instr)
    wanted = machine.src(instr.operands[2], "u32", instr)

    def run():
        parked = np.zeros(machine.threads, bool)
        for block, addr, threads, off in each():
            machine.shared.note_read(off, 8, threads, instr)
            obj = state.find(block, addr, instr)
            state.deliver(obj)
            ready = (np.broadcast_to(wanted, machine.threads)[threads] & 1) != obj.phase
            d[threads] = ready
            for warp in np.unique(machine.warp_of[threads[ready]]):
                machine.shared.races.acquire(block, warp, obj.done)
            if blocking and not ready.all():
                parked[threads[~ready]] = True
                obj.waiting.append(threads[~ready])
        if not parked.any():
            return None
        rest = machine.mask_array() & ~parked
        machine.park(parked, AT_MBARRIER, index)
        machine.pcs[rest] = index + 1
        return RESCHEDULE

    return run


def arrive_after_copies(machine, instr, mods, copies):
    """cp.async.mbarrier.arrive: an arrival once the thread's earlier cp.async have landed."""
    mods.need("arrive")
    extra = 0 if mods.flag("noinc") else 1
    mods.take(*SPACES)
    mods.take("b64")
    mods.done()
    state = mbarriers(machine)
    each = _each(machine, instr.operands[0], instr)

    def run():
        for block, addr, threads, off in each():
            machine.shared.note_read(off, 8, threads, instr)
            obj = state.find(block, addr, instr)
            obj.pending += extra * len(threads)
            flights = copies.take(threads)

            def arrive(obj=obj, block=block, threads=threads, flights=flights):
                copies.land(flights)
                warps = machine.warp_of[threads]
                for warp in np.unique(warps):
                    state.arrive(obj, block, warp, int((warps == warp).sum()), instr)

            obj.late.append(arrive)

    return run
