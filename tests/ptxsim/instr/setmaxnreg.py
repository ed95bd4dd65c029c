"""setmaxnreg: warpgroups give registers back to their block, and take more (PTX ISA, "Miscellaneous Instructions").

A block starts with what .maxnreg says for each thread, or with the most that .maxntid or .reqntid leave each of them,
which is what ptxas then compiles for. Where nothing says, neither direction nor budget are checked.
"""

from math import prod

import numpy as np

from ..decode import handles
from ..errors import PtxError, UnsupportedInstruction
from ..parser import Imm
from .warp import collective

GROUP = 128
FILE = 65536  # registers of a multiprocessor


def at_launch(directives):
    """Registers of each thread when a block starts, or None."""
    if "maxnreg" in directives:
        return directives["maxnreg"][0]
    threads = directives.get("reqntid") or directives.get("maxntid")
    if threads is None:
        return None
    blocks = directives.get("minnctapersm", (1,))[0]
    return min(FILE // (prod(threads) * blocks) // 8 * 8, 255)


class Pool:
    """What each warpgroup has, per thread, and what each block has left."""

    def __init__(self, machine):
        self.machine, self.launch = machine, at_launch(machine.kernel.directives)
        machine.hooks_reset.append(self.reset)
        self.reset()

    def reset(self):
        m = self.machine
        self.held = np.full((m.blocks, m.warps // 4), self.launch or 0)
        self.free = np.zeros(m.blocks, np.int64)

    def change(self, block, group, count, grow, instr):
        """Whether a warpgroup has its `count` registers a thread now; if not, it must wait for others to give."""
        if self.launch is None:
            return True
        held = int(self.held[block, group])
        if count < held if grow else count > held:
            raise PtxError(
                f"warpgroup {group} of the block has {held} registers a thread: "
                f"{'inc to fewer' if grow else 'dec to more'}, {count}, is undefined",
                instr,
            )
        if (count - held) * GROUP > self.free[block]:
            return False
        self.free[block] -= (count - held) * GROUP
        self.held[block, group] = count
        return True


@handles("setmaxnreg")
def setmaxnreg(machine, instr, mods, index):
    from ..machine import AT_REGISTERS, RESCHEDULE, RUN

    kind = mods.need("inc", "dec")
    mods.need("sync")
    mods.need("aligned")
    mods.need("u32")
    mods.done()
    (count,) = instr.operands
    if not isinstance(count, Imm) or not 24 <= count.value <= 256 or count.value % 8:
        raise UnsupportedInstruction("the count must be a multiple of 8 from 24 to 256", instr)
    if machine.warps % 4:
        raise UnsupportedInstruction(f"needs whole warpgroups, the block has {machine.warps} warps", instr)
    if not hasattr(machine, "register_pool"):
        machine.register_pool = Pool(machine)
    pool = machine.register_pool

    def run():
        parked = np.zeros(machine.threads, bool)
        for first in machine.active_warps()[::4] * 32:
            threads = slice(first, first + GROUP)
            if machine.gone[threads].any():
                raise PtxError("some threads of the warpgroup have exited or don't exist", instr)
            block, group = int(machine.block_of[first]), int(machine.warp_of[first]) // 4
            if not pool.change(block, group, count.value, kind == "inc", instr):
                parked[threads] = True
        waiting = machine.status == AT_REGISTERS
        if kind == "dec" and waiting.any():
            machine.status[waiting] = RUN
        if not parked.any():
            return None
        rest = machine.mask_array() & ~parked
        machine.park(parked, AT_REGISTERS, index)
        machine.pcs[rest] = index + 1
        return RESCHEDULE

    return collective(machine, index, run, span=GROUP)
