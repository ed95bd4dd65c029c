"""Loads and stores by state space, shared by every instruction that touches memory."""

import numpy as np

from . import layout, report
from .errors import MemoryFault, UnsupportedInstruction
from .parser import Mem, Reg

SPACES = ("global", "shared", "local", "param", "const", "generic")


def address(machine, mem, instr):
    """A callable giving the addresses ([base + offset]) of the threads it is asked for, as uint64."""
    if not isinstance(mem, Mem):
        raise UnsupportedInstruction(f"{mem} is not an address", instr)
    if isinstance(mem.base, Reg):
        width = machine.operands.width(mem.base)
        base = machine.src(mem.base, f"u{8 * width}", instr)
        offset = np.array(mem.offset, np.int64).astype(base.dtype)
        plain = mem.offset == 0

        def dynamic(threads):
            chosen = base if threads is machine.everyone else base[threads]
            return (chosen if plain else chosen + offset).astype(np.uint64, copy=plain is False)

        return dynamic
    constant = machine.src(mem.base, "u64", instr) + np.array(mem.offset, np.int64).astype(np.uint64)
    return lambda threads: np.full(len(threads), constant, np.uint64)


def load(machine, space, addr, width, threads, instr, index, ordered=False):
    """Raw values at addr: (n,) unsigned of that width, or (n, width) bytes for 16 and 32.

    `ordered` accesses (volatile, relaxed, acquire) synchronise by themselves and are no data race.
    """
    if space == "generic":
        return _split(
            machine,
            addr,
            lambda s, a, t, _: load(machine, s, a, width, t, instr, index, ordered),
            threads,
            width,
        )
    if space in ("global", "const"):
        off = machine.memory.check(addr, width, False, instr, lambda i: machine.thread_name(threads[i]))
        if machine.options.statistics:
            note_global(machine, addr, width, threads, index)
        view = machine.memory.words[width] if width <= 8 else machine.memory.rows[width]
        return view[off // width]
    if space == "shared":
        off = machine.shared.offsets(addr, width, threads, instr)
        if machine.options.statistics:
            note_shared(machine, addr, width, threads, index)
        if not ordered:
            machine.shared.note_read(off, width, threads, instr)
        return machine.shared.load(off, width)
    data = machine.local if space == "local" else machine.layout.param_bytes
    off = _private(machine, space, addr, width, threads, instr)
    rows = data[off[:, None] + np.arange(width)]
    return rows.view(f"u{width}").reshape(-1) if width <= 8 else rows


def store(machine, space, addr, width, threads, values, instr, index, ordered=False):
    """Write raw values ((n,) unsigned of that width, or rows of words totalling it) at addr."""
    if space == "generic":

        def part(s, a, t, chosen):
            store(machine, s, a, width, t, values[chosen], instr, index, ordered)
            return np.zeros(len(t), np.uint8)

        _split(machine, addr, part, threads, 1)
    elif space == "global":
        off = machine.memory.check(addr, width, True, instr, lambda i: machine.thread_name(threads[i]))
        if machine.options.statistics:
            note_global(machine, addr, width, threads, index)
        if width <= 8:
            machine.memory.words[width][off // width] = values
        else:
            machine.memory.rows[width][off // width] = (
                np.ascontiguousarray(values).view(np.uint8).reshape(-1, width)
            )
    elif space == "shared":
        off = machine.shared.offsets(addr, width, threads, instr)
        if machine.options.statistics:
            note_shared(machine, addr, width, threads, index)
        machine.shared.store(off, width, threads, values, index, instr, ordered)
    elif space == "local":
        off = _private(machine, space, addr, width, threads, instr)
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1, width)
        machine.local[off[:, None] + np.arange(width)] = raw
    else:
        raise UnsupportedInstruction(f"a store to .{space}", instr)


def _split(machine, addr, action, threads, width):
    """Run `action` once per state space among generic addresses and put the results together."""
    out = None
    for space in ("global", "shared", "local", "param"):
        chosen = layout.in_window(addr, space)
        if chosen.any():
            part = action(space, addr[chosen] - np.uint64(layout.window(space)), threads[chosen], chosen)
            if chosen.all():
                return part
            if out is None:
                out = np.zeros((len(addr), *part.shape[1:]), part.dtype)
            out[chosen] = part
    return out


def _private(machine, space, addr, width, threads, instr):
    size = machine.layout.local_size if space == "local" else machine.layout.param_size
    off = addr.astype(np.int64)
    bad = (off < 0) | (off > size - width) | (off % width != 0)
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise MemoryFault(
            f"{space} memory, out of bounds or misaligned: offset {int(off[i])}, {width} bytes of {size}, "
            f"by {machine.thread_name(threads[i])}",
            instr,
        )
    return off + threads * size if space == "local" else off


def note_shared(machine, addr, width, threads, index):
    """Count the wavefronts of one execution (statistics)."""
    machine.report.note_shared(index, *report.shared_wavefronts(addr.astype(np.int64), width, threads // 32))


def note_global(machine, addr, width, threads, index):
    """Count the 32-byte sectors of one execution (statistics)."""
    machine.report.note_global(index, *report.global_sectors(addr, width, threads // 32))
