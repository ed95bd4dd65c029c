"""bra, ret, exit, trap, and what has no effect on results: nanosleep, prefetch, griddepcontrol."""

import numpy as np

from ..decode import handles
from ..errors import PtxError, UnsupportedInstruction
from ..parser import Not


def bind_branch(machine, instr, index):
    """bra with its guard. Returns the target when all active threads agree, RESCHEDULE when they part."""
    from ..machine import RESCHEDULE

    label = instr.operands[0].name
    if label not in machine.kernel.labels:
        raise UnsupportedInstruction(f"label {label} is not defined", instr)
    target = machine.kernel.labels[label]
    if instr.guard is None:
        return lambda: target
    negate = isinstance(instr.guard, Not)
    array = machine.src(instr.guard.reg if negate else instr.guard, "pred", instr)

    def run():
        taken = ~array if negate else array
        if machine.mask is True:
            count, total = np.count_nonzero(taken), machine.threads
        else:
            taken = taken & machine.mask
            count, total = np.count_nonzero(taken), len(machine.active())
        if count == 0:
            return None
        if count == total:
            return target
        mask = machine.mask_array()
        machine.pcs[mask] = index + 1
        machine.pcs[taken] = target
        return RESCHEDULE

    return run


@handles("ret", "exit")
def leave(machine, instr, mods, index):
    mods.flag("uni")
    mods.done()
    return machine.exit_threads


@handles("trap", "brkpt")
def trap(machine, instr, mods, index):
    mods.done()

    def run():
        raise PtxError(f"trap reached by {machine.thread_name(machine.active()[0])}", instr)

    return run


@handles("nanosleep", "prefetch", "prefetchu", "griddepcontrol", "applypriority", "discard")
def nothing(machine, instr, mods, index):
    """Timing or hints only."""
    return lambda: None
