"""What handlers register themselves in, and the reader of an opcode's modifiers that lets none go unnoticed."""

from .errors import UnsupportedInstruction

HANDLERS = {}
TYPES = {
    "b8", "b16", "b32", "b64", "u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64",
    "f16", "bf16", "f16x2", "bf16x2", "tf32", "f32", "f64", "f32x2", "pred", "b128",
}  # fmt: skip


def handles(*ops):
    """Register a factory (machine, instr, mods, index) -> callable for opcodes (the part before the first dot)."""

    def register(factory):
        for op in ops:
            if op in HANDLERS:
                raise ValueError(f"two handlers for {op}")
            HANDLERS[op] = factory
        return factory

    return register


class Mods:
    """An instruction's modifiers, taken one by one; `done()` raises for any that nobody took."""

    def __init__(self, instr):
        self.instr, self.left = instr, list(instr.mods)

    def take(self, *choices, default=None):
        """Remove and return the first modifier that is one of `choices`."""
        for m in self.left:
            if m in choices:
                self.left.remove(m)
                return m
        return default

    def flag(self, name):
        return self.take(name) is not None

    def need(self, *choices):
        m = self.take(*choices)
        if m is None:
            raise UnsupportedInstruction(f"none of the modifiers {', '.join(choices)}", self.instr)
        return m

    def prefix(self, *starts):
        """Remove and return every modifier that begins with one of `starts` (cache hints and the like)."""
        found = [m for m in self.left if m.startswith(starts)]
        for m in found:
            self.left.remove(m)
        return found

    def type(self):
        """Remove and return the next type name."""
        for m in self.left:
            if m in TYPES:
                self.left.remove(m)
                return m
        raise UnsupportedInstruction("no type that the simulator knows", self.instr)

    def done(self):
        if self.left:
            raise UnsupportedInstruction(
                f"modifier .{self.left[0]} is not implemented for {self.instr.op}", self.instr
            )


def bind(machine, instr, index):
    """The callable that executes `instr`, ignoring its guard."""
    factory = HANDLERS.get(instr.op)
    if factory is None:
        raise UnsupportedInstruction(f"opcode {instr.op} is not implemented", instr)
    return factory(machine, instr, Mods(instr), index)
