"""A model of CUtensorMap: what a tensor copy needs to know, in 128 bytes of the simulator's own layout.

The driver's encoding is not public. Host code passes a `TensorMap` where the kernel has a 128-byte parameter; device
code fills the same 128 bytes by tensormap.replace. Dimension 0 is the innermost, as in cuTensorMapEncodeTiled.
"""

import struct
from dataclasses import dataclass

import numpy as np

from .errors import LaunchError
from .memory import as_numpy

BYTES = 128
ELEMENT_BYTES = (1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4)
ELEMENT_CODES = {"uint8": 0, "uint16": 1, "uint32": 2, "int32": 3, "uint64": 4, "int64": 5, "float16": 6, "float32": 7,
                 "float64": 9, "bfloat16": 10}  # fmt: skip
SWIZZLE_CODES = {0: 0, 32: 1, 64: 2, 128: 3}
SWIZZLE_WIDTH = (16, 32, 64, 128)
# field: (offset, struct code, how many)
FIELDS = {
    "global_address": (0, "Q", 1), "rank": (8, "I", 1), "elemtype": (12, "I", 1), "interleave_layout": (16, "I", 1),
    "swizzle_mode": (20, "I", 1), "fill_mode": (24, "I", 1), "swizzle_atomicity": (28, "I", 1),
    "global_dim": (32, "I", 5), "global_stride": (56, "Q", 4), "box_dim": (88, "I", 5), "element_stride": (108, "I", 5),
}  # fmt: skip


class TensorMap:
    """Launch argument: a tensor map over `array` (its last axis innermost and dense) with a box per axis, outermost
    first like the array's shape; swizzle in bytes: 0, 32, 64 or 128; out-of-bounds elements are 0, or NaN."""

    def __init__(self, array, box, swizzle=0, fill_nan=False):
        self.array, self.box, self.swizzle, self.fill_nan = array, tuple(box), swizzle, fill_nan

    def encode(self, address):
        a = as_numpy(self.array)
        if a.ndim != len(self.box) or not 1 <= a.ndim <= 5:
            raise LaunchError(
                f"a tensor map over {a.ndim} axes with a box of {len(self.box)}: 1 to 5, and equal"
            )
        if a.strides[-1] != a.itemsize or any(s % 16 for s in a.strides[:-1]):
            raise LaunchError(
                f"tensor map strides {a.strides}: the last must be dense, the others multiples of 16"
            )
        if any(not 1 <= b <= 256 for b in self.box) or self.swizzle not in SWIZZLE_CODES:
            raise LaunchError(
                f"tensor map box {self.box} (1 to 256 each), swizzle {self.swizzle} (0, 32, 64, 128)"
            )
        inner = self.box[-1] * a.itemsize
        if inner % 16 or (self.swizzle and inner > self.swizzle):
            raise LaunchError(
                f"a box's row is {inner} bytes: a multiple of 16, at most the swizzle's {self.swizzle}"
            )
        kind = str(self.array.dtype).removeprefix("torch.")  # numpy knows no bfloat16
        if self.fill_nan and "float" not in kind:
            raise LaunchError(f"a tensor map of {kind} can't be filled with NaN")
        raw = bytearray(BYTES)

        def put(name, values):
            offset, code, _ = FIELDS[name]
            struct.pack_into(f"<{len(values)}{code}", raw, offset, *values)

        put("global_address", [address])
        put("rank", [a.ndim - 1])
        put("elemtype", [ELEMENT_CODES[kind]])
        put("swizzle_mode", [SWIZZLE_CODES[self.swizzle]])
        put("fill_mode", [int(self.fill_nan)])
        put("global_dim", a.shape[::-1])
        put("global_stride", a.strides[:-1][::-1] or [0])
        put("box_dim", self.box[::-1])
        put("element_stride", [1] * a.ndim)
        return bytes(raw)


@dataclass
class Box:
    """One tensor copy: shared-memory offsets of its elements, their global addresses, and which are inside."""

    local: np.ndarray
    address: np.ndarray
    inside: np.ndarray
    element: int
    nan: bool


def box(raw, coordinates):
    """(Box, swizzle width) of a 128-byte map at coordinates, innermost first. ValueError for what isn't modelled."""
    get = lambda name: struct.unpack_from(f"<{FIELDS[name][2]}{FIELDS[name][1]}", raw, FIELDS[name][0])  # noqa: E731
    rank = get("rank")[0] + 1
    if rank != len(coordinates):
        raise ValueError(f"a map of {rank} dimensions used with {len(coordinates)} coordinates")
    if get("interleave_layout")[0] or any(s != 1 for s in get("element_stride")[:rank]):
        raise ValueError("interleaved layouts and element strides are not modelled")
    if get("swizzle_atomicity")[0]:
        raise ValueError("only the default swizzle atomicity is modelled")
    element = ELEMENT_BYTES[get("elemtype")[0]]
    sizes, dims = get("box_dim")[:rank], get("global_dim")[:rank]
    strides = (element, *get("global_stride")[: rank - 1])
    grids = np.meshgrid(*(np.arange(n) for n in sizes[::-1]), indexing="ij")[
        ::-1
    ]  # grids[0] runs along dimension 0
    inside = np.ones(grids[0].shape, bool)
    address = np.full(grids[0].shape, get("global_address")[0], np.int64)
    local = np.zeros(grids[0].shape, np.int64)
    pitch = element
    for grid, start, n, size, stride in zip(grids, coordinates, dims, sizes, strides, strict=True):
        at = grid + start
        inside &= (at >= 0) & (at < n)
        address += at * stride
        local += grid * pitch
        pitch *= size
    width = SWIZZLE_WIDTH[get("swizzle_mode")[0]]
    flat = local.reshape(-1)
    return Box(
        flat, address.reshape(-1).astype(np.uint64), inside.reshape(-1), element, bool(get("fill_mode")[0])
    ), width
