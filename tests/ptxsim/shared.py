"""Shared memory of the blocks under simulation: bytes, bounds and alignment, and every access told to the detector."""

import numpy as np

from .errors import MemoryFault
from .races import RaceDetector

BASE = 1024
WINDOW = 0x0100_0000_0000
POISON = 0xFF


class SharedMemory:
    def __init__(self, machine, size, granule, detect_races):
        self.machine, self.size = machine, size
        self.stride = -(-max(size, 1) // 1024) * 1024
        self.data = np.empty(machine.blocks * self.stride, np.uint8)
        self.words = {w: self.data.view(f"u{w}") for w in (1, 2, 4, 8)}
        self.rows = {w: self.data.reshape(-1, w) for w in (16, 32)}
        self.races = RaceDetector(machine.blocks, machine.warps, self.stride, granule, detect_races)
        self.reset()

    def reset(self):
        self.data[:] = POISON
        self.races.reset()

    def offsets(self, addr, width, threads, instr):
        """Byte offsets into `data` of shared addresses (any unsigned array) used by the given threads."""
        local = addr.astype(np.int64) - BASE
        bad = (local < 0) | (local > self.size - width) | ((local & (width - 1)) != 0)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            why = f"misaligned: a {width}-byte access needs a multiple of {width}"
            if local[i] < 0 or local[i] > self.size - width:
                why = f"out of bounds: the block has {self.size} bytes from {BASE:#x}"
            raise MemoryFault(
                f"shared memory, {why}; address {int(local[i]) + BASE:#x}, {width} bytes, "
                f"by {self.machine.thread_name(threads[i])}; {int(bad.sum())} threads in all",
                instr,
            )
        return local + self.machine.block_of[threads] * self.stride

    def note_read(self, off, width, threads, instr, asynchronous=False):
        """Tell the detector of reads; raises for unwritten bytes and races."""
        rows, block, warp = self._who(off, width, threads)
        check = self.machine.options.check_uninitialised
        bad, kind = self.races.read(rows, width, block, warp, check, asynchronous)
        if bad is None:
            return
        if kind == "unwritten":
            i = int(np.flatnonzero(bad)[0])
            raise MemoryFault(
                f"shared memory, read of bytes never written: {width} bytes at "
                f"{int(off[i] - block[i] * self.stride) + BASE:#x} by {self.machine.thread_name(threads[i])}; "
                f"{int(bad.sum())} threads in all",
                instr,
            )
        self._raise(rows, width, block, warp, bad, kind, instr)

    def store(self, off, width, threads, values, index, instr, ordered=False):
        """Write values: (n,) unsigned of that width, or rows of words. Writes of equal values may collide."""
        rows, block, warp = self._who(off, width, threads)
        view, values = self.view(width), self._as_rows(values, width)
        if ordered:
            view[rows] = values
            self.races.land(rows, width, block, warp)
            return
        bad, kind = self.races.write(rows, width, block, warp, index)
        if bad is not None:
            if kind == "same":
                view[rows] = values
            if kind != "read":
                bad = bad & _differ(view[rows], values)
            if bad.any():
                self._raise(rows, width, block, warp, bad, kind, instr)
            self.races.land(rows, width, block, warp)
        view[rows] = values

    def start_copy(self, off, width, threads, index, instr):
        """The destination of an asynchronous copy: poisoned and untouchable until `land`."""
        rows, block, warp = self._who(off, width, threads)
        bad, kind = self.races.write(rows, width, block, warp, index, pending=True)
        if bad is not None and kind != "same":
            self._raise(rows, width, block, warp, bad, kind, instr)
        self.view(width)[rows] = POISON if width > 8 else (1 << (8 * width)) - 1

    def land(self, off, width, threads, values):
        rows, block, warp = self._who(off, width, threads)
        self.view(width)[rows] = self._as_rows(values, width)
        self.races.land(rows, width, block, warp)

    def view(self, width):
        return self.words[width] if width <= 8 else self.rows[width]

    def load(self, off, width):
        return self.view(width)[off // width]

    def _who(self, off, width, threads):
        return off // width, self.machine.block_of[threads], self.machine.warp_of[threads]

    @staticmethod
    def _as_rows(values, width):
        return values if width <= 8 else np.ascontiguousarray(values).view(np.uint8).reshape(-1, width)

    def _raise(self, rows, width, block, warp, bad, kind, instr):
        address = rows * width - block * self.stride + BASE
        program = self.machine.kernel.instrs
        raise self.races.explain(rows, width, block, warp, bad, kind, program, instr, address)


def _differ(a, b):
    d = a != b
    return d.any(1) if d.ndim == 2 else d
