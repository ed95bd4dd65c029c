"""bar and barrier in all forms: sync, arrive, red, warp.sync; named barriers and thread counts (PTX ISA 9.7.13.1).

A barrier completes when as many threads arrived as its count says, or, without one, all living threads of the
block. Then the waiting ones run on, and everybody who arrived is ordered before everybody who waited.
Arrivals that nobody waits for, when the barrier completes or the last thread exits, order nothing: somebody's
wait is missing.
"""

import numpy as np

from ..decode import handles
from ..errors import RaceFault, UnsupportedInstruction
from ..parser import Reg
from .warp import collective

BARRIERS = 16


@handles("bar", "barrier")
def bar(machine, instr, mods, index):
    mods.take("cta")
    if mods.flag("cluster"):
        return _cluster(machine, instr, mods, index)
    if mods.flag("warp"):
        mods.need("sync")
        mods.done()
        member = machine.src(instr.operands[0], "u32", instr)
        return collective(machine, index, lambda: None, member)
    kind = mods.need("sync", "arrive", "red")
    aligned = mods.flag("aligned") or instr.op == "bar"
    reduce = mods.take("popc", "and", "or") if kind == "red" else None
    if reduce:
        mods.type()
    mods.done()
    operands = list(instr.operands)
    result = operands.pop(0) if reduce else None
    predicate = machine.operands.predicate(operands.pop(), instr) if reduce else None
    number = machine.src(operands[0], "u32", instr)
    count = machine.src(operands[1], "u32", instr) if len(operands) > 1 else None
    if kind == "arrive" and count is None:
        raise UnsupportedInstruction("bar.arrive needs a thread count", instr)
    state = _state(machine)
    reduction = None
    if reduce:
        typ = "u32" if reduce == "popc" else "pred"
        reduction = (reduce, machine.dst(result, typ, instr), predicate)
    simple = not isinstance(operands[0], Reg) and count is None and kind == "sync"

    def body():
        if simple and machine.where is True and state.idle():
            state.meet_all()
            return None
        return state.arrive(number, count, kind == "arrive", reduction, index, instr)

    return collective(machine, index, body) if aligned else body


def _state(machine):
    if not hasattr(machine, "barrier_state"):
        machine.barrier_state = BarrierState(machine)
        machine.hooks_exit.append(machine.barrier_state.check_all)
        machine.hooks_reset.append(machine.barrier_state.reset)
    return machine.barrier_state


class BarrierState:
    """Arrivals at each of the 16 barriers of each block."""

    def __init__(self, machine):
        self.machine = machine
        self.reset()

    def reset(self):
        m = self.machine
        self.waiting = {}  # (block, barrier) -> list of (threads, must be released, reduction)
        self.expected = {}
        self.last_instr = {}  # who arrived last
        self.block_slices = [slice(b * m.padded, (b + 1) * m.padded) for b in range(m.blocks)]

    def idle(self):
        return not self.waiting

    def meet_all(self):
        m = self.machine
        m.shared.races.barrier(
            np.unique(m.block_of[m.active()]) if m.mask is not True else np.arange(m.blocks)
        )

    def arrive(self, number, count, only_arrive, reduction, index, instr):
        from ..machine import AT_BARRIER, RESCHEDULE

        m = self.machine
        threads = m.active()
        numbers = np.broadcast_to(number, m.threads)[threads]
        if (numbers >= BARRIERS).any():
            raise UnsupportedInstruction(f"barrier {int(numbers.max())}: there are {BARRIERS}", instr)
        counts = None if count is None else np.broadcast_to(count, m.threads)[threads].astype(np.int64)
        if not only_arrive:
            m.park(m.mask_array().copy(), AT_BARRIER, index + 1)
        blocks = m.block_of[threads]
        keys = blocks * BARRIERS + numbers
        for key in np.unique(keys):
            mine = keys == key
            block, name = int(key) // BARRIERS, int(key) % BARRIERS
            if counts is not None:
                self._expect(block, name, int(counts[mine][0]), instr)
            self.waiting.setdefault((block, name), []).append((threads[mine], not only_arrive, reduction))
            self.last_instr[block, name] = instr
            self._check(block, name)
        return None if only_arrive else RESCHEDULE

    def _expect(self, block, name, count, instr):
        if count % 32:
            raise UnsupportedInstruction(
                f"a barrier's thread count must be a multiple of 32, not {count}", instr
            )
        old = self.expected.setdefault((block, name), count)
        if old != count:
            raise UnsupportedInstruction(
                f"barrier {name} is used with counts {old} and {count} at once", instr
            )

    def check_all(self):
        """Threads have exited: barriers that wait for all the living may be complete."""
        for block, name in list(self.waiting):
            self._check(block, name)
        for (block, name), groups in self.waiting.items():
            if self.machine.gone[self.block_slices[block]].all():
                arrived = sum(len(t) for t, _, _ in groups)
                raise RaceFault(
                    f"barrier {name} is left with {arrived} arrivals that nobody waited for",
                    self.last_instr[block, name],
                )

    def _check(self, block, name):
        from ..machine import RUN

        m = self.machine
        groups = self.waiting[block, name]
        arrived = sum(len(t) for t, _, _ in groups)
        expected = self.expected.get((block, name))
        if expected is None:
            expected = int((~m.gone[self.block_slices[block]]).sum())
        else:  # counts are in whole warps
            arrived = 32 * len(np.unique(np.concatenate([t // 32 for t, _, _ in groups])))
        if arrived < expected:
            return
        del self.waiting[block, name]
        self.expected.pop((block, name), None)
        if not any(release for _, release, _ in groups):
            raise RaceFault(
                f"barrier {name} completes by arrivals alone: nobody waits", self.last_instr[block, name]
            )
        self._order(block, groups)
        self._reduce(groups)
        for threads, release, _ in groups:
            if release:
                m.status[threads] = RUN

    def _order(self, block, groups):
        m = self.machine
        races = m.shared.races
        warps = {w: release for t, release, _ in groups for w in np.unique(m.warp_of[t])}
        alive = np.unique(m.warp_of[self.block_slices[block]][~m.gone[self.block_slices[block]]])
        if all(warps.get(w) for w in alive):
            races.barrier(np.array([block]))
            return
        known = np.maximum.reduce([races.release(block, w) for w in warps])
        for w, released in warps.items():
            if released:
                races.acquire(block, w, known)

    @staticmethod
    def _reduce(groups):
        if groups[0][2] is None:
            return
        kind = groups[0][2][0]
        bits = np.concatenate([p()[t] for t, _, (_, _, p) in groups])
        value = {"popc": bits.sum, "and": bits.all, "or": bits.any}[kind]()
        for threads, _, (_, d, _) in groups:
            d[threads] = value


def _cluster(machine, instr, mods, index):
    """barrier.cluster with clusters of one block: arrive does nothing, wait is a block-wide barrier."""
    kind = mods.need("arrive", "wait")
    mods.take("release", "relaxed", "acquire")
    mods.flag("aligned")
    mods.done()
    if kind == "arrive":
        return lambda: None
    state = _state(machine)

    def body():
        if machine.where is True and state.idle():
            state.meet_all()
            return None
        return state.arrive(np.uint32(BARRIERS - 1), None, False, None, index, instr)

    return collective(machine, index, body)
