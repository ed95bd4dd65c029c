"""What a run did: instructions by class, barriers, bank conflicts, global-memory sectors."""

import numpy as np

CLASSES = {
    "mma": "matrix", "wgmma": "matrix", "ldmatrix": "matrix load/store", "stmatrix": "matrix load/store",
    "movmatrix": "matrix load/store", "cp": "async copy", "bar": "barrier", "barrier": "barrier", "mbarrier": "barrier",
    "fence": "barrier", "membar": "barrier", "shfl": "warp", "vote": "warp", "match": "warp", "redux": "warp",
    "activemask": "warp", "elect": "warp", "ex2": "special function", "lg2": "special function",
    "rcp": "special function", "rsqrt": "special function", "sqrt": "special function", "sin": "special function",
    "cos": "special function", "tanh": "special function", "cvt": "convert", "bra": "control", "ret": "control",
    "exit": "control", "trap": "control", "mov": "move", "selp": "move", "prmt": "move", "setp": "compare",
    "set": "compare", "atom": "atomic", "red": "atomic",
}  # fmt: skip
FLOATS = ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "f32x2")


def classify(instr):
    """The class an instruction is counted in."""
    if instr.op in ("ld", "ldu", "st"):
        space = next(
            (m for m in instr.mods if m.split("::")[0] in ("shared", "global", "param", "local", "const")),
            "generic",
        )
        kind = "load" if instr.op != "st" else "store"
        return f"{space.split('::')[0]} {kind}"
    if instr.op in CLASSES:
        return CLASSES[instr.op]
    return "float" if any(m in FLOATS for m in instr.mods) else "integer"


class Report:
    """Counts over all blocks of a launch, in warp instructions unless said otherwise.

    `shared_conflicts` and `global_sectors` stay empty unless the run had statistics=True.
    """

    def __init__(self, kernel):
        self.kernel = kernel
        self.blocks = 0
        self._issued = np.zeros(len(kernel.instrs) + 2, np.int64)
        self.shared = {}
        self.globals = {}

    def issued(self, start, end, warps):
        self._issued[start] += warps
        self._issued[end] -= warps

    @property
    def per_instruction(self):
        """Warp instructions issued at each instruction of the kernel (predicated-off ones included)."""
        return np.cumsum(self._issued)[: len(self.kernel.instrs)]

    def by_class(self):
        """{class: warp instructions}, largest first."""
        return self._sum(classify)

    def by_opcode(self):
        """{full opcode: warp instructions}, largest first."""
        return self._sum(lambda i: i.name)

    def _sum(self, key):
        total = {}
        for instr, n in zip(self.kernel.instrs, self.per_instruction, strict=True):
            if n:
                total[key(instr)] = total.get(key(instr), 0) + int(n)
        return dict(sorted(total.items(), key=lambda kv: -kv[1]))

    def count(self, prefix):
        """Warp instructions whose full opcode starts with `prefix`, e.g. 'bar.sync' or 'mma.sync'."""
        return sum(n for name, n in self.by_opcode().items() if name.startswith(prefix))

    def note_shared(self, index, wavefronts, ideal):
        """Add one execution's shared-memory wavefronts and the fewest its bytes could take."""
        old = self.shared.get(index, (0, 0))
        self.shared[index] = (old[0] + wavefronts, old[1] + ideal)

    def note_global(self, index, sectors, ideal, requests):
        old = self.globals.get(index, (0, 0, 0))
        self.globals[index] = (old[0] + sectors, old[1] + ideal, old[2] + requests)

    def bank_conflicts(self):
        """{line: extra wavefronts} of shared accesses that took more than the fewest possible."""
        lines = self.kernel.instrs
        return {lines[i].line: w - ideal for i, (w, ideal) in sorted(self.shared.items()) if w > ideal}

    def global_sectors(self):
        """{line: (32-byte sectors moved, fewest possible, warp requests)} of global accesses."""
        return {self.kernel.instrs[i].line: v for i, v in sorted(self.globals.items())}

    def text(self):
        """A table for people."""
        rows = [
            f"{self.kernel.name}: {self.blocks} blocks, {int(self.per_instruction.sum())} warp instructions"
        ]
        rows += [f"  {n:>12,}  {name}" for name, n in self.by_class().items()]
        for line, extra in self.bank_conflicts().items():
            rows.append(f"  bank conflicts: {extra} extra wavefronts at line {line}")
        for line, (moved, ideal, requests) in self.global_sectors().items():
            rows.append(f"  global line {line}: {moved} sectors ({ideal} at best) in {requests} requests")
        return "\n".join(rows)


def shared_wavefronts(addr, width, warps):
    """(wavefronts, fewest possible) of one warp-wide shared access: 32 banks of 4 bytes, 128 bytes a wavefront.

    `addr` are byte addresses of active threads, `warps` their warps. Lanes reading the same word share it; accesses
    of 8 and 16 bytes go half and quarter warps at a time, as the hardware groups them.
    """
    lanes = max(width // 4, 1)
    order = np.arange(len(addr))
    first = np.r_[0, np.flatnonzero(np.diff(warps)) + 1]
    position = order - np.repeat(first, np.diff(np.r_[first, len(addr)]))
    phase = warps * 4 + position // (32 // lanes)
    words = (addr[:, None] // 4 + np.arange(lanes)).ravel()
    phases = np.repeat(phase, lanes)
    key = np.unique(phases.astype(np.int64) << 32 | words)
    groups, words = key >> 32, key & 0xFFFFFFFF
    _, per_bank = np.unique(groups * 32 + words % 32, return_counts=True)
    banks = np.unique(groups * 32 + words % 32) // 32
    starts = np.r_[0, np.flatnonzero(np.diff(banks)) + 1]
    worst = np.maximum.reduceat(per_bank, starts)
    return int(worst.sum()), len(worst)


def global_sectors(addr, width, warps):
    """(sectors touched, fewest possible, requests) of one warp-wide global access."""
    sectors = (addr.astype(np.int64)[:, None] + np.arange(0, width, min(width, 32))) // 32
    touched = np.unique(
        np.repeat(warps, sectors.shape[1]).astype(np.int64) << 48 | sectors.ravel() & ((1 << 48) - 1)
    )
    unique = np.unique(warps.astype(np.int64) << 48 | addr.astype(np.int64) & ((1 << 48) - 1)) >> 48
    requests, per = np.unique(unique, return_counts=True)
    return len(touched), int((-(-per * width // 32)).sum()), len(requests)
