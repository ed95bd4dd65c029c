"""Shared-memory matrix descriptors and swizzles of wgmma (PTX ISA 9.7.15.5.1, "Matrix Descriptor Format")."""

import numpy as np

SWIZZLE_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}


def swizzle(addr, width):
    """XOR the 16-byte chunk number within `width` bytes (32, 64, 128) with the 128-byte row number above it.

    `width` 16 means no swizzle. The pattern repeats every 8 * width bytes and follows address bits.
    """
    chunks = width // 16
    return addr ^ (((addr >> 7) & (chunks - 1)) << 4)


class Descriptor:
    """Fields of descriptors (uint64 array): byte addresses and offsets, and the common swizzle width."""

    def __init__(self, bits):
        field = lambda low, count: ((bits >> np.uint64(low)) & np.uint64((1 << count) - 1)).astype(np.int64)  # noqa: E731
        self.start = field(0, 14) * 16
        self.leading = field(16, 14) * 16
        self.stride = field(32, 14) * 16
        self.base_offset = field(49, 3)
        modes = np.unique(field(62, 2))
        self.modes = [int(m) for m in modes]
        self.width = SWIZZLE_BYTES[self.modes[0]]

    def chunks_k_major(self, rows, k_bytes):
        """Addresses (matrices, rows, k_bytes / 16) of 16-byte chunks of a matrix whose rows run along k."""
        r, c = np.arange(rows)[:, None], np.arange(k_bytes // 16)[None, :]
        start, leading, stride = (v[:, None, None] for v in (self.start, self.leading, self.stride))
        along = leading * c if self.width == 16 else 16 * c
        return swizzle(start + r % 8 * self.width + r // 8 * stride + along, self.width)

    def chunks_mn_major(self, elements, k, element_bytes):
        """Addresses (matrices, k, elements * element_bytes / 16) of chunks that run along m or n."""
        kk, c = np.arange(k)[:, None], np.arange(elements * element_bytes // 16)[None, :]
        start, leading, stride = (v[:, None, None] for v in (self.start, self.leading, self.stride))
        if self.width == 16:
            return start + c * stride + kk % 8 * 16 + kk // 8 * leading
        per_row = self.width // 16
        at = start + c % per_row * 16 + c // per_row * leading + kk % 8 * self.width + kk // 8 * stride
        return swizzle(at, self.width)
