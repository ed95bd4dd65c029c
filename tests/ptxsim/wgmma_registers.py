"""Registers that wgmma works on, its accumulators and fragments of A, and what else touches them.

Against an earlier product such an access is ordered by the wgmma.wait_group that covers it, against a later one by
a wgmma.fence, which also stands before a warp's first product. Products of one shape that share accumulators need
neither between them (PTX ISA, "wgmma.fence" and "wgmma.wait_group"). Reading a fragment of A in flight is let pass.
"""

import numpy as np

from .errors import RaceFault
from .parser import Reg, Vec

# Of a register and a warp: how many fences the warp had executed at the last access, and what that was.
CODE_BITS = 10
ORDINARY, FRAGMENT = 0, 1  # and from 8 on, an accumulator of so many columns
NO_DESTINATION = ("st", "red", "stmatrix", "bar", "barrier", "cp", "mbarrier")


def is_product(instr):
    return instr.op == "wgmma" and "mma_async" in instr.mods


class WgmmaRegisters:
    def __init__(self, machine):
        self.machine, self.warps = machine, machine.blocks * machine.warps
        self.rows = {}
        for instr in filter(is_product, machine.kernel.instrs):
            for name in _names(o for o in instr.operands[:2] if isinstance(o, Vec)):
                self.rows.setdefault(name, len(self.rows))
        self.names = list(self.rows)
        machine.hooks_reset.append(self.reset)
        self.reset()

    def reset(self):
        shape = len(self.rows), self.warps
        self.now = np.zeros(self.warps, np.int64)  # a warp's fences, shifted by CODE_BITS
        self.last = np.full(shape, -1, np.int64)
        self.last_instr = [None] * len(self.rows)
        self.group = np.full(shape, -1, np.int64)  # of the product in flight that has the register
        self.flying = set()

    def watch(self, instr, body):
        """`body` of an ordinary instruction, with its accesses noted; unchanged where it makes none."""
        operands = list(instr.operands)
        written = [] if instr.op in NO_DESTINATION else self._rows(operands[:1])
        rows = self._rows(operands)
        if not rows:
            return body

        def run():
            warps = slice(None) if self.machine.mask is True else self.machine.active_warps()
            if self.flying and not self.flying.isdisjoint(rows):
                self._refuse_in_flight(instr, rows, written, warps)
            now = self.now[warps]
            for row in rows:
                self.last[row, warps] = now
                self.last_instr[row] = instr
            return body()

        return run

    def fence(self):
        self.now[self.machine.active_warps()] += 1 << CODE_BITS

    def issue(self, instr, columns, warps, group):
        """A product of these warps, in the commit group of each."""
        if (self.now[warps] == 0).any():
            raise RaceFault("a warp's first wgmma, and no wgmma.fence before it", instr)
        accumulators, a = instr.operands[:2]
        for operand, code in ((accumulators, columns), (a, FRAGMENT)):
            rows = self._rows([operand])
            if not rows:
                continue
            at = np.ix_(rows, warps)
            last, now = self.last[at], self.now[warps]
            other = (last & ((1 << CODE_BITS) - 1) != code) & (last >= 0)
            for bad, why in (
                (other & (self.group[at] >= 0), "that product is still in flight"),
                (other & (last >= now), "no wgmma.fence between"),
            ):
                if bad.any():
                    row = rows[int(np.flatnonzero(bad.any(1))[0])]
                    raise RaceFault(f"{self.names[row]} was used by {self._last(row)}; {why}", instr)
            self.last[at] = now | code
            self.group[at] = group
            for row in rows:
                self.last_instr[row] = instr
            self.flying.update(rows)

    def wait(self, warps, before):
        """These warps have waited for their products of groups below `before`."""
        if not self.flying:
            return
        rows = np.array(sorted(self.flying))
        at = np.ix_(rows, warps)
        self.group[at] = np.where(self.group[at] < before, -1, self.group[at])
        self.flying = set(rows[(self.group[rows] >= 0).any(1)].tolist())

    def _rows(self, operands):
        return sorted({self.rows[name] for name in _names(operands) if name in self.rows})

    def _refuse_in_flight(self, instr, rows, written, warps):
        for row in self.flying.intersection(rows):
            flying = self.group[row, warps] >= 0
            fragment = self.last[row, warps] & ((1 << CODE_BITS) - 1) == FRAGMENT
            if row not in written:
                flying &= ~fragment
            if flying.any():
                what = "overwritten" if row in written else "read"
                raise RaceFault(
                    f"{self.names[row]} is {what} while the product of {self._last(row)} is in flight", instr
                )

    def _last(self, row):
        instr = self.last_instr[row]
        return f"line {instr.line}: {instr.text}"


def _names(operands):
    for o in operands:
        if isinstance(o, Reg):
            yield o.name
        elif isinstance(o, Vec):
            yield from _names(o.items)
        else:
            yield from _names(vars(o).values() if hasattr(o, "__dict__") else ())
