"""Where a kernel's variables lie: shared and local memory, constants, parameters, and the generic address windows."""

import numpy as np

from . import shared
from .errors import LaunchError
from .parser import type_bytes

LOCAL_WINDOW = 0x0200_0000_0000
PARAM_WINDOW = 0x0300_0000_0000
WINDOW_BITS = 40


def window(space):
    """First generic address of a state space; 0 for spaces whose addresses are generic already."""
    space = space.split("::")[0]
    return {"shared": shared.WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}.get(space, 0)


def in_window(addr, space):
    """Which of these generic addresses lie in a state space."""
    base = window(space)
    prefix = addr >> np.uint64(WINDOW_BITS)
    if base:
        return prefix == np.uint64(base >> WINDOW_BITS)
    taken = [shared.WINDOW, LOCAL_WINDOW, PARAM_WINDOW]
    return ~np.isin(prefix, [np.uint64(w >> WINDOW_BITS) for w in taken])


class Layout:
    """Addresses of every symbol of one kernel for a launch with `dynamic` bytes of dynamic shared memory."""

    def __init__(self, module, kernel, dynamic):
        self.symbols, self.dynamic_size = {}, dynamic
        self.constants = []
        self._shared(module, kernel, dynamic)
        self._local(kernel)
        self._params(kernel)
        self.granule = granule(kernel)

    def _shared(self, module, kernel, dynamic):
        names = _mentioned(kernel)
        everything = [v for v in (*module.variables, *kernel.variables) if v.space == "shared"]
        static = [v for v in everything if v.size is not None and (v in kernel.variables or v.name in names)]
        top = 0
        for v in static:
            top = -(-top // v.align) * v.align
            self.symbols[v.name] = shared.BASE + top
            top += v.size
        extern = [v for v in everything if v.size is None]
        align = max((v.align for v in extern), default=1)
        start = -(-top // max(align, 16)) * max(align, 16) if extern else top
        for v in extern:
            self.symbols[v.name] = shared.BASE + start
        self.shared_size = start + dynamic if extern else top + dynamic

    def _local(self, kernel):
        top = 0
        for v in (v for v in kernel.variables if v.space == "local"):
            top = -(-top // v.align) * v.align
            self.symbols[v.name] = top
            top += v.size
        self.local_size = -(-top // 16) * 16

    def _params(self, kernel):
        top = 0
        for p in kernel.params:
            top = -(-top // p.align) * p.align
            self.symbols[p.name] = top
            top += p.size
        self.param_size = top

    def place_globals(self, module, kernel, memory):
        """Register module-level .global and .const arrays that the kernel mentions as buffers."""
        names = _mentioned(kernel)
        for v in module.variables:
            if v.space in ("global", "const") and v.name in names:
                if v.size is None:
                    raise LaunchError(f"{v.name} is declared elsewhere: only one module is known")
                data = np.frombuffer(v.init or bytes(v.size), np.uint8).copy()
                mode = "in" if v.space == "const" else "inout"
                self.symbols[v.name] = memory.add(data, mode, v.name).address


def _mentioned(kernel):
    names = set()

    def visit(o):
        for part in (o, *getattr(o, "items", ()), getattr(o, "base", None)):
            if hasattr(part, "name"):
                names.add(part.name)

    for instr in kernel.instrs:
        for o in instr.operands:
            visit(o)
    return names


def granule(kernel):
    """The narrowest access to shared memory in the kernel, 1, 2 or 4 bytes: what races are tracked by."""
    smallest = 4
    for instr in kernel.instrs:
        shared_space = any(m.startswith("shared") for m in instr.mods)
        generic = not any(m.split("::")[0] in ("global", "param", "local", "const") for m in instr.mods)
        if instr.op in ("ld", "st", "atom", "red") and (shared_space or generic):
            for m in instr.mods:
                if m in ("b8", "u8", "s8", "b16", "u16", "s16", "f16", "bf16"):
                    smallest = min(smallest, type_bytes(m))
    return smallest
