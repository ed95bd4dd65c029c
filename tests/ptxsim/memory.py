"""Global memory: one arena of bytes with a state per byte, in which callers register buffers.

Between buffers lie guard gaps whose state is FORBIDDEN, so one lookup answers bounds, holes of strided views,
write protection and initialisation together. Device addresses start far above 4 GiB: a pointer that was cut to
32 bits, or a shared-memory address used as a global one, can't land in a buffer.
"""

import copy

import numpy as np

from .errors import LaunchError, MemoryFault

BASE = 0x7A00_0000_0000
GUARD = 1 << 18  # more than a tile's overhang, which would land in the next buffer unnoticed
FORBIDDEN, UNWRITTEN, WRITTEN, READ_ONLY = 0, 1, 2, 3
POISON = 0xFF


class Buffer:
    """A registered range: `address` on the device, `array` the caller's numpy view it mirrors."""

    def __init__(self, name, address, array, low, span):
        self.name, self.address, self.array, self.low, self.span = name, address, array, low, span


class In:
    """Marks a launch argument as read-only: a store to it is a MemoryFault."""

    def __init__(self, array):
        self.array = array


class Out:
    """Marks a launch argument as output only: its bytes are poisoned (0xFF: NaN, -1) and reading one before the
    kernel wrote it is a MemoryFault."""

    def __init__(self, array):
        self.array = array


def as_numpy(array):
    """A numpy view of a numpy array or a torch CPU tensor (bfloat16 as uint16 codes), sharing memory."""
    if isinstance(array, np.ndarray):
        return array
    if type(array).__module__.split(".")[0] == "torch":
        import torch

        t = array.detach()
        return t.view(torch.int16).numpy().view(np.uint16) if t.dtype == torch.bfloat16 else t.numpy()
    raise LaunchError(f"argument {array!r} is neither a numpy array nor a torch CPU tensor")


class GlobalMemory:
    def __init__(self):
        self.buffers = []
        self.size = GUARD
        self.data = self.state = None

    def add(self, array, mode="inout", name="?"):
        """Reserve room for `array` (any strides) and return its Buffer. Call before `commit`.

        The same memory given twice in the same way is one buffer, as it is on a GPU.
        """
        a = as_numpy(array)
        for buffer in self.buffers if a.size else ():
            if buffer.mode == mode and _place(buffer.array) == _place(a):
                return buffer
        low, high = _extent(a)
        # The element at the array's own data pointer keeps 256-byte alignment as torch's and CUDA's allocators give.
        start = -(-self.size // 256) * 256 + -(low // 256) * 256
        buffer = Buffer(name, BASE + start, a, low, high - low)
        buffer.mode = mode
        self.buffers.append(buffer)
        self.size = start + high + GUARD
        return buffer

    def commit(self):
        """Allocate the arena and copy every registered array in."""
        size = -(-self.size // 64) * 64
        # Zeros take no memory until they are touched: rows may lie far apart.
        self.data = np.zeros(size, np.uint8)
        self.state = np.zeros(size, np.uint8)  # FORBIDDEN
        for b in self.buffers:
            self._view(self.data, b, np.uint8, itemwise=True)[...] = POISON
            mark = {"in": READ_ONLY, "out": UNWRITTEN, "inout": WRITTEN}[b.mode]
            self._view(self.state, b, np.uint8, itemwise=True)[...] = mark
            if b.mode != "out":
                self._view(self.data, b, b.array.dtype)[...] = b.array
        self._views()

    def copy(self):
        """The same buffers with contents of their own, to run a launch again."""
        copied = copy.copy(self)
        copied.data, copied.state = self.data.copy(), self.state.copy()
        copied._views()
        return copied

    def _views(self):
        self.words = {w: self.data.view(f"u{w}") for w in (1, 2, 4, 8)}
        self.rows = {w: self.data.reshape(-1, w) for w in (16, 32)}

    def write_back(self):
        """Copy what the kernel left in every writable buffer to the caller's arrays."""
        for b in self.buffers:
            if b.mode != "in":
                b.array[...] = self._view(self.data, b, b.array.dtype)

    def _view(self, arena, b, dtype, itemwise=False):
        start = b.address - BASE
        dtype = np.dtype(dtype)
        if itemwise:
            shape, strides = (*b.array.shape, b.array.itemsize), (*b.array.strides, 1)
        else:
            shape, strides = b.array.shape, b.array.strides
        return np.ndarray(shape, dtype, arena.data, start, strides)

    def describe(self, address):
        """Where an address lies relative to the registered buffers, in words."""
        best = None
        for b in self.buffers:
            first = b.address + b.low
            distance = max(first - address, address - (first + b.span - 1), 0)
            if best is None or distance < best[0]:
                best = (distance, b, address - b.address)
        if best is None:
            return f"address {address:#x}, and no buffer is registered"
        distance, b, offset = best
        shape = "x".join(map(str, b.array.shape))
        if distance == 0:
            return f"byte {offset} of buffer {b.name!r} ({shape} {b.array.dtype}, {b.span} bytes)"
        return f"address {address:#x}, {distance} bytes outside buffer {b.name!r} ({shape} {b.array.dtype})"

    def check(self, addr, width, write, instr, threads):
        """Arena offsets (int64) of `addr` (uint64 array) after bounds, alignment, state; raises MemoryFault.

        `threads(i)` names the thread of element i for the message. A write marks its bytes as written.
        """
        off = (addr - np.uint64(BASE)).astype(np.int64)
        bad = (off < 0) | (off > self.data.size - width)
        if bad.any():
            self._fault(addr, bad, "out of bounds", instr, threads, width)
        bad = (off & (width - 1)) != 0
        if bad.any():
            self._fault(
                addr,
                bad,
                f"misaligned: a {width}-byte access needs a multiple of {width}",
                instr,
                threads,
                width,
            )
        state = self.state.reshape(-1, width)
        rows = off // width if width > 1 else off
        seen = state[rows]
        low, high = (seen.min(), seen.max()) if seen.size else (WRITTEN, WRITTEN)
        if low == FORBIDDEN:
            self._fault(addr, (seen == FORBIDDEN).any(1), "out of bounds", instr, threads, width)
        if write:
            if high == READ_ONLY:
                self._fault(
                    addr, (seen == READ_ONLY).any(1), "write to a read-only argument", instr, threads, width
                )
            if low != WRITTEN:
                state[rows] = WRITTEN
        elif low == UNWRITTEN:
            self._fault(
                addr, (seen == UNWRITTEN).any(1), "read of bytes never written", instr, threads, width
            )
        return off

    def _fault(self, addr, bad, what, instr, threads, width):
        i = int(np.flatnonzero(bad)[0])
        where = self.describe(int(addr[i]))
        raise MemoryFault(
            f"global memory, {what}: {width} bytes at {where}, by {threads(i)}; {int(bad.sum())} threads in all",
            instr,
        )


def _place(a):
    return a.ctypes.data, a.shape, a.strides, a.dtype


def _extent(a):
    """Byte offsets (lowest, one past highest) of a view's elements relative to its data pointer."""
    if a.size == 0:
        return 0, 0
    low = sum((n - 1) * s for n, s in zip(a.shape, a.strides, strict=True) if s < 0)
    high = sum((n - 1) * s for n, s in zip(a.shape, a.strides, strict=True) if s > 0) + a.itemsize
    return low, high
