"""Registers as arrays, and operands as views of them.

A register is one array with an element for every thread of every block under simulation. Handlers ask once, when
the program is bound, for a view in the type they compute in; at run time they only call numpy on those views.
"""

import numpy as np

from .errors import UnsupportedInstruction
from .parser import SINK, Imm, Not, Reg, Special, Sym, type_bytes

NUMPY = {
    **{f"{k}{n}": np.dtype(f"u{n // 8}") for k in "bu" for n in (8, 16, 32, 64)},
    **{f"s{n}": np.dtype(f"i{n // 8}") for n in (8, 16, 32, 64)},
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    "f16x2": np.dtype(np.uint32),
    "bf16x2": np.dtype(np.uint32),
    "tf32": np.dtype(np.uint32),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "f32x2": np.dtype(np.uint64),
    "pred": np.dtype(bool),
}
# NaN as f32, as each half and as each bf16 of a pair: a register nobody wrote shows up in any result it reaches.
UNDEFINED = {2: 0x7FC5, 4: 0x7FC5FFC5, 8: 0x7FC5FFC57FC5FFC5, 1: 0}


class Operands:
    """Bind-time access to one kernel's registers, symbols and special registers over `threads` threads."""

    def __init__(self, kernel, threads, symbols, specials):
        self.threads, self.symbols, self.specials = threads, symbols, specials
        self.registers = {n: np.empty(threads, _storage(t)) for n, t in kernel.registers.items()}

    def reset(self):
        for a in self.registers.values():
            a[:] = UNDEFINED[a.itemsize] if a.dtype != bool else False

    def src(self, operand, typ, instr):
        """A view (threads,) or scalar of the operand's value in the numpy dtype for `typ`."""
        want = NUMPY[typ]
        if isinstance(operand, Reg):
            raw = self.registers[operand.name]
            if want.itemsize > raw.itemsize:
                raise UnsupportedInstruction(f"{operand.name} is narrower than .{typ}", instr)
            if want == raw.dtype:
                return raw
            return (
                raw.view(want)[:: raw.itemsize // want.itemsize]
                if raw.itemsize > want.itemsize
                else raw.view(want)
            )
        if isinstance(operand, Special):
            name = operand.name
            if name == "WARP_SZ":
                return want.type(32)
            if name not in self.specials:
                raise UnsupportedInstruction(f"special register {name} is not modelled", instr)
            raw = self.specials[name]
            return (
                raw
                if raw.dtype == want
                else raw.view(want)
                if raw.itemsize == want.itemsize
                else raw.astype(want)
            )
        if isinstance(operand, Imm):
            return self.constant(operand, typ)
        if isinstance(operand, Sym):
            if operand.name not in self.symbols:
                raise UnsupportedInstruction(f"unknown name {operand.name!r}", instr)
            return want.type(self.symbols[operand.name] + operand.offset)
        raise UnsupportedInstruction(f"operand {operand} can't be read as .{typ}", instr)

    @staticmethod
    def constant(imm, typ):
        want = NUMPY[typ]
        if want == bool:
            return np.bool_(imm.value != 0)
        if imm.float_bits and want.kind == "f" and want.itemsize * 8 != imm.float_bits:
            return want.type(np.array(imm.value, f"u{imm.float_bits // 8}").view(f"f{imm.float_bits // 8}"))
        if not imm.float_bits and want.kind == "f" and typ in ("f32", "f64"):
            return want.type(imm.value)
        bits = imm.value & ((1 << (8 * want.itemsize)) - 1)
        return np.array(bits, f"u{want.itemsize}").view(want)[()]

    def dst(self, operand, typ, instr):
        """A writable view (threads,) of exactly `typ`'s width; `_` is written to a scratch array."""
        want = NUMPY[typ]
        if operand == SINK:
            return np.empty(self.threads, want)
        if not isinstance(operand, Reg):
            raise UnsupportedInstruction(f"operand {operand} can't be written", instr)
        raw = self.registers[operand.name]
        if raw.itemsize != want.itemsize or (raw.dtype == bool) != (want == bool):
            raise UnsupportedInstruction(f"{operand.name} ({raw.dtype}) doesn't hold .{typ}", instr)
        return raw.view(want)

    def width(self, operand):
        """Bytes of a register, or 0 for what is none."""
        return self.registers[operand.name].itemsize if isinstance(operand, Reg) else 0

    def predicate(self, operand, instr):
        """A callable giving the current bool array of `p` or `!p`."""
        if isinstance(operand, Not):
            array = self.src(operand.reg, "pred", instr)
            return lambda: ~array
        array = self.src(operand, "pred", instr)
        return lambda: array


def _storage(kind):
    return np.dtype(bool) if kind == "pred" else np.dtype(f"u{type_bytes(kind)}")
