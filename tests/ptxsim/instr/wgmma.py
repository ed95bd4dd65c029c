"""wgmma: asynchronous matrix products of a warpgroup of 128 threads (PTX ISA 9.7.15).

The product is computed when issued. Its results reach the accumulator registers when the warpgroup waits for the
group it was committed in; until then those registers hold NaN, and its reads of shared memory count as going on.
"""

import re

import numpy as np

from ..decode import handles
from ..descriptors import Descriptor
from ..errors import UnsupportedInstruction
from ..operands import UNDEFINED
from ..parser import Imm, Reg, Vec
from ..pending import Groups, PendingReads
from .matrix import decode_elements
from .warp import collective

GROUP = 128


@handles("wgmma")
def wgmma(machine, instr, mods, index):
    if machine.warps % 4:
        raise UnsupportedInstruction(
            f"wgmma needs whole warpgroups, the block has {machine.warps} warps", instr
        )
    kind = mods.need("mma_async", "fence", "commit_group", "wait_group")
    mods.need("sync")
    mods.flag("aligned")
    state = _state(machine)
    if kind == "mma_async":
        return collective(machine, index, _Product(machine, instr, mods, state, index), span=GROUP)
    mods.done()
    if kind == "fence":
        return collective(machine, index, machine.wgmma_registers.fence)
    if kind == "commit_group":
        return state.groups.commit
    pending = instr.operands[0].value
    return collective(machine, index, lambda: state.wait(pending), span=GROUP)


def _state(machine):
    if not hasattr(machine, "wgmma"):
        machine.wgmma = _InFlight(machine)
    return machine.wgmma


class _Accumulator:
    """A set of accumulator registers with results in flight: values (registers, threads) and group per thread."""

    def __init__(self, names, threads):
        self.names = names
        self.values = np.empty((len(names), threads), np.float32)
        self.flying = np.zeros(threads, bool)
        self.group = np.zeros(threads, np.int64)


class _InFlight:
    """Accumulators and shared-memory reads of products that have not been waited for."""

    def __init__(self, machine):
        self.machine, self.groups, self.accumulators = machine, Groups(machine), {}
        self.reads = PendingReads(machine, self.groups)
        machine.hooks_reset.append(self.accumulators.clear)

    def current(self, names, registers, threads, instr):
        """Accumulator values, those of products in flight included: such products run in order."""
        values = np.stack([r[threads] for r in registers])
        for other in self.accumulators.values():
            if other.names != names and other.flying[threads].any() and set(other.names) & set(names):
                raise UnsupportedInstruction("accumulators in flight overlap without being the same", instr)
        known = self.accumulators.get(names)
        if known is not None:
            flying = known.flying[threads]
            values[:, flying] = known.values[:, threads[flying]]
        return values

    def issue(self, names, registers, threads, values):
        known = self.accumulators.setdefault(names, _Accumulator(names, self.machine.threads))
        known.values[:, threads] = values
        known.flying[threads] = True
        known.group[threads] = self.groups.current(threads)
        for r in registers:
            r.view(np.uint32)[threads] = UNDEFINED[4]

    def note_reads(self, off, threads, instr):
        """Reads by every warp of the warpgroups whose first threads these are."""
        every = np.concatenate([threads + 32 * w for w in range(4)])
        self.reads.note(np.tile(off, 4), every, instr)

    def wait(self, pending):
        machine = self.machine
        for known in self.accumulators.values():
            done = known.flying & self.groups.done(machine.everyone, known.group, pending)
            if not done.any():
                continue
            for name, values in zip(known.names, known.values, strict=True):
                np.copyto(machine.operands.registers[name].view(np.float32), values, where=done)
            known.flying &= ~done
        self.reads.wait(pending)
        warps = machine.active_warps()
        machine.wgmma_registers.wait(warps, self.groups.committed[warps * 32] - pending)


class _Product:
    """One wgmma.mma_async, bound."""

    def __init__(self, machine, instr, mods, state, index):
        self.machine, self.instr, self.state = machine, instr, state
        shape = next((m for m in mods.left if re.fullmatch(r"m64n\d+k\d+", m)), None)
        if shape is None:
            raise UnsupportedInstruction("no m64nNkK shape", instr)
        mods.left.remove(shape)
        self.n, self.k = (int(v) for v in re.findall(r"\d+", shape)[1:])
        d_type, self.typ, b_type = (mods.type() for _ in range(3))
        mods.done()
        if (
            d_type != "f32"
            or self.typ != b_type
            or self.k != {"f16": 16, "bf16": 16, "tf32": 8}.get(self.typ)
        ):
            raise UnsupportedInstruction(
                f"wgmma {shape} {d_type} {self.typ} {b_type} is not implemented", instr
            )
        self.bytes = 4 if self.typ == "tf32" else 2
        d, a, b, *rest = instr.operands
        if not all(isinstance(o, Reg) for o in d.items) or len(d.items) != self.n // 2:
            raise UnsupportedInstruction(f"{self.n // 2} accumulator registers are needed", instr)
        self.names = tuple(o.name for o in d.items)
        self.d = [machine.dst(o, "f32", instr) for o in d.items]
        self.a_registers = [machine.src(o, "b32", instr) for o in a.items] if isinstance(a, Vec) else None
        self.a = None if self.a_registers else machine.src(a, "u64", instr)
        self.b = machine.src(b, "u64", instr)
        self._immediates(rest)

    def _immediates(self, rest):
        """scale-d, then the signs of a and b, then (16-bit types) which of them are transposed."""
        scale = rest.pop(0) if rest else Imm(1)
        if isinstance(scale, Imm):
            self.accumulate = lambda: bool(scale.value)
        else:
            array = self.machine.src(scale, "pred", self.instr)
            self.accumulate = lambda: array
        numbers = [o.value for o in rest]
        self.sign = float(numbers[0] * numbers[1])
        flags = numbers[2:]
        if self.a_registers is not None:
            flags = [0, *flags]
        self.transpose_a, self.transpose_b = (*flags, 0, 0)[:2]
        if self.typ == "tf32" and (self.transpose_a or self.transpose_b):
            raise UnsupportedInstruction("tf32 operands can't be transposed", self.instr)

    def __call__(self):
        m = self.machine
        leaders = m.active_warps()[::4] * 32
        threads = (leaders[:, None] + np.arange(GROUP)).reshape(-1)
        groups = len(leaders)
        warps = (leaders[:, None] // 32 + np.arange(4)).reshape(-1)
        m.wgmma_registers.issue(self.instr, self.n, warps, self.state.groups.current(warps * 32))
        b = self._matrix(self.b, self.n, self.transpose_b, leaders)
        a = (
            self._fragments(threads)
            if self.a_registers
            else self._matrix(self.a, 64, self.transpose_a, leaders)
        )
        product = np.matmul(a, b.swapaxes(1, 2))
        if self.sign != 1.0:
            product *= np.float32(self.sign)
        # Accumulator j of a thread: row 16*warp + group + 8*(j/2%2), column 8*(j/4) + 2*position + j%2.
        product = product.reshape(groups, 4, 2, 8, self.n // 8, 4, 2)
        product = product.transpose(4, 2, 6, 0, 1, 3, 5).reshape(self.n // 2, groups * GROUP)
        keep = self.accumulate()
        if keep is not False:
            old = self.state.current(self.names, self.d, threads, self.instr)
            product = product + (old if keep is True else np.where(keep[threads], old, np.float32(0)))
        self.state.issue(self.names, self.d, threads, product)

    def _matrix(self, descriptor, rows, transposed, leaders):
        """(warpgroups, rows, k) float32 of a matrix in shared memory."""
        m = self.machine
        d = Descriptor(np.broadcast_to(descriptor, m.threads)[leaders])
        if len(d.modes) > 1 or d.base_offset.any():
            raise UnsupportedInstruction("mixed swizzles, or a base offset, in wgmma descriptors", self.instr)
        if transposed:
            chunks = d.chunks_mn_major(rows, self.k, self.bytes)
        else:
            chunks = d.chunks_k_major(rows, self.k * self.bytes)
        per_group = chunks[0].size
        threads = np.repeat(leaders, per_group)
        off = m.shared.offsets(chunks.reshape(-1), 16, threads, self.instr)
        self.state.note_reads(off, threads, self.instr)
        words = m.shared.load(off, 16).view(np.uint32).reshape(-1)
        values = decode_elements(words, self.typ)
        if transposed:
            return values.reshape(len(leaders), self.k, rows).swapaxes(1, 2)
        return values.reshape(len(leaders), rows, self.k)

    def _fragments(self, threads):
        """(warpgroups, 64, k) of A held in registers: laid out like mma.sync's A, one 16-row slice a warp."""
        packed = 4 // self.bytes
        words = np.empty((len(threads) // 32, 2, 8, 2, 4), np.uint32)
        for i, r in enumerate(self.a_registers):
            words[:, i % 2, :, i // 2, :] = np.broadcast_to(r, self.machine.threads)[threads].reshape(
                -1, 8, 4
            )
        values = decode_elements(words.reshape(-1), self.typ)
        return values.reshape(-1, 4 * 16, 2 * 4 * packed)
