"""Everything the simulator can find wrong with a program, one class per kind of finding."""


class PtxError(Exception):
    """Base class. `line` is the 1-based line of the PTX text, `source` the file:line of a .loc above it."""

    def __init__(self, message, instr=None):
        self.detail = message
        self.line = getattr(instr, "line", None)
        self.source = getattr(instr, "source", None)
        where = ""
        if instr is not None:
            where = f"line {instr.line}: {instr.text.strip()}"
            where += f" ({instr.source})\n  " if instr.source else "\n  "
        super().__init__(where + message)


class ParseError(PtxError):
    """The text is not PTX this parser knows."""


class UnsupportedInstruction(PtxError):
    """An opcode or a modifier that no handler implements: an error, never skipped."""


class LaunchError(PtxError):
    """Grid, block or arguments don't fit the kernel."""


class MemoryFault(PtxError):
    """Out of bounds, misaligned, a write to read-only memory, or a read of bytes nobody has written."""


class RaceFault(PtxError):
    """Two warps touched the same shared bytes, one of them writing, with nothing ordering them; or a cp.async,
    bulk copy or wgmma that was still in flight when its bytes or registers were used."""


class Deadlock(PtxError):
    """No thread can run and some have not exited: a barrier that never completes, a warp that never reconverges."""


class Timeout(PtxError):
    """More instructions than `max_steps`: most likely an endless loop."""
