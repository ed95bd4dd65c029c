"""cp.async and its groups (PTX ISA 9.7.9.25.3). Bytes land when the issuing thread waits for their group, not before:
until then the destination is poison, and touching it is a race."""

import numpy as np

from .. import access
from ..decode import handles
from ..errors import UnsupportedInstruction
from ..parser import Reg
from ..pending import Groups
from .bulk import bulk
from .mbarrier import arrive_after_copies


class Copies:
    """cp.async operations in flight: (threads, offsets, width, values, group of each thread)."""

    def __init__(self, machine):
        self.machine, self.groups, self.flying = machine, Groups(machine), []
        machine.hooks_reset.append(self.flying.clear)

    def issue(self, threads, off, width, values):
        self.flying.append((threads, off, width, values, self.groups.current(threads)))

    def wait(self, pending):
        """Active threads wait until at most `pending` of their latest groups are in flight; None for everything."""
        self.land(self._split(lambda threads, group: self.groups.done(threads, group, pending)))

    def take(self, threads):
        """Everything these threads have in flight, no longer waited for by groups."""
        return self._split(lambda mine, group: np.isin(mine, threads))

    def land(self, flights):
        for threads, off, width, values, _ in flights:
            self.machine.shared.land(off, width, threads, values)

    def _split(self, wanted):
        """Remove and return the operations, or parts of them, that `wanted` marks."""
        taken, kept = [], []
        for flight in self.flying:
            threads, off, width, values, group = flight
            chosen = wanted(threads, group)
            if chosen.all():
                taken.append(flight)
                continue
            for to, mask in ((taken, chosen), (kept, ~chosen)):
                if mask.any():
                    to.append((threads[mask], off[mask], width, values[mask], group[mask]))
        self.flying[:] = kept
        return taken


def copies(machine):
    if not hasattr(machine, "copies"):
        machine.copies = Copies(machine)
    return machine.copies


@handles("cp")
def cp(machine, instr, mods, index):
    mods.need("async")
    if mods.flag("bulk"):
        return bulk(machine, instr, mods, index)
    state = copies(machine)
    if mods.flag("mbarrier"):
        return arrive_after_copies(machine, instr, mods, state)
    if mods.flag("commit_group"):
        mods.done()
        return state.groups.commit
    if mods.flag("wait_all"):
        mods.done()
        return lambda: state.wait(None)
    if mods.flag("wait_group"):
        mods.done()
        pending = instr.operands[0].value
        return lambda: state.wait(pending)
    return _copy(machine, instr, mods, index, state)


def _copy(machine, instr, mods, index, state):
    cache = mods.need("ca", "cg")
    mods.prefix("L2::")
    mods.need("shared", "shared::cta")
    mods.need("global")
    mods.done()
    to = access.address(machine, instr.operands[0], instr)
    origin = access.address(machine, instr.operands[1], instr)
    width = instr.operands[2].value
    if width not in ((16,) if cache == "cg" else (4, 8, 16)):
        raise UnsupportedInstruction(
            f"cp.async.{cache} copies {'16' if cache == 'cg' else '4, 8 or 16'} bytes", instr
        )
    size = _source_size(machine, instr, width)

    def run():
        threads = machine.active()
        if not len(threads):
            return
        wanted = np.broadcast_to(size(), machine.threads)[threads].astype(np.int64)
        if (wanted > width).any():
            raise UnsupportedInstruction(f"src-size {int(wanted.max())} exceeds cp-size {width}", instr)
        off = machine.shared.offsets(to(threads), width, threads, instr)
        if machine.options.statistics:
            access.note_shared(machine, to(threads), width, threads, index)
        values = _read(machine, origin(threads), width, wanted, threads, instr, index)
        machine.shared.start_copy(off, width, threads, index, instr)
        state.issue(threads, off, width, values)

    return run


def _source_size(machine, instr, width):
    """The optional fourth operand: a byte count, or a predicate `ignore-src` that makes it 0."""
    if len(instr.operands) < 4:
        return lambda: width
    operand = instr.operands[3]
    if isinstance(operand, Reg) and machine.operands.registers[operand.name].dtype == bool:
        ignore = machine.src(operand, "pred", instr)
        return lambda: np.where(ignore, 0, width)
    if machine.operands.width(operand) == 8:  # a cache policy
        return lambda: width
    array = machine.src(operand, "u32", instr)
    return lambda: array


def _read(machine, addr, width, wanted, threads, instr, index):
    """Source bytes as rows; those beyond src-size are zero and not read at all."""
    values = np.zeros((len(threads), width), np.uint8)
    for size in np.unique(wanted):
        chosen = wanted == size
        if size == 0:
            continue
        if size == width:
            raw = access.load(machine, "global", addr[chosen], width, threads[chosen], instr, index)
            values[chosen] = raw if width > 8 else np.ascontiguousarray(raw).view(np.uint8).reshape(-1, width)
        else:
            _read_part(machine, addr, int(size), width, chosen, threads, values, instr, index)
    return values if width > 8 else values.view(f"u{width}").reshape(-1)


def _read_part(machine, addr, size, width, chosen, threads, values, instr, index):
    if (addr[chosen] % np.uint64(width)).any():
        access.load(
            machine, "global", addr[chosen], width, threads[chosen], instr, index
        )  # raises: misaligned
    for byte in range(size):
        at = addr[chosen] + np.uint64(byte)
        values[chosen, byte] = access.load(machine, "global", at, 1, threads[chosen], instr, index)
