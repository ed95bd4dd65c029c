"""Exact conversions between floating-point formats, each rounding mode, on arrays of bits or numbers.

Formats: fp16 as numpy float16, bf16 as uint16 codes, tf32 as uint32 (fp32 whose 13 low bits are zero).
"""

import numpy as np

_HALF = np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32)


def half_to_f32(codes):
    """fp16 codes (uint16) to float32: a table, faster than numpy's conversion."""
    return np.take(_HALF, codes)


def bf16_to_f32(codes):
    return (np.asarray(codes).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x, mode="rn"):
    """bf16 codes of float32 values; NaN becomes 0x7fff, as the hardware's canonical one."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    nan = np.isnan(x)
    if mode == "rn":
        r = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    elif mode == "rz":
        r = u >> np.uint32(16)
    elif mode == "rna":
        r = (u + np.uint32(0x8000)) >> np.uint32(16)
    else:
        away = (u >> np.uint32(31)) == (1 if mode == "rm" else 0)
        r = (u >> np.uint32(16)) + (away & ((u & np.uint32(0xFFFF)) != 0))
    return np.where(nan, 0x7FFF, r).astype(np.uint16)


def f32_to_tf32(x, mode="rna"):
    """float32 bits rounded to 10 mantissa bits. `rna`: ties away from zero (the only mode before PTX 8.6's rn)."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    special = (u & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    if mode == "rna":
        r = u + np.uint32(0x1000)
    elif mode == "rn":
        r = u + np.uint32(0xFFF) + ((u >> np.uint32(13)) & np.uint32(1))
    else:
        r = u
    return np.where(special, u, r & np.uint32(0xFFFFE000)).astype(np.uint32)


def to_f16(x, mode="rn"):
    """fp16 (numpy float16) of float32 or float64 values, overflow to infinity in rn, to the largest in rz."""
    with np.errstate(all="ignore"):
        h = np.asarray(x).astype(np.float16)
    return h if mode == "rn" else _redirect(h, x, mode)


def to_f32(x, mode="rn"):
    """float32 of float64 values (or of integers given as float64/longdouble)."""
    with np.errstate(all="ignore"):
        f = np.asarray(x).astype(np.float32)
    return f if mode == "rn" else _redirect(f, x, mode)


def _redirect(nearest, exact, mode):
    """Step a nearest-even result to the neighbour that rounding towards zero, -inf or +inf asks for."""
    exact = np.asarray(exact)
    wide = nearest.astype(exact.dtype if exact.dtype.kind == "f" else np.float64)
    inf = nearest.dtype.type(np.inf)
    down, up = np.nextafter(nearest, -inf), np.nextafter(nearest, inf)
    above, below = wide > exact, wide < exact
    if mode == "rm":
        return np.where(above, down, nearest)
    if mode == "rp":
        return np.where(below, up, nearest)
    if mode == "rz":
        return np.where(above & (exact > 0), down, np.where(below & (exact < 0), up, nearest))
    raise ValueError(f"rounding mode {mode}")


def odd_sum(p, c):
    """p + c in float64 rounded to odd: rounding the result again to a narrower format is then exact.

    (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd".)
    """
    s = p + c
    bb = s - p
    error = (p - (s - bb)) + (c - bb)
    bits = s.view(np.int64)
    nudge = (error != 0) & ((bits & 1) == 0) & np.isfinite(s)
    towards = np.where((error > 0) == (s > 0), 1, -1)
    return np.where(nudge, bits + towards, bits).view(np.float64)


def fma32(a, b, c, mode="rn"):
    """float32 a*b+c with one rounding. The product is exact in float64; only near-halfway sums need the slow way."""
    p = np.multiply(a, b, dtype=np.float64)
    if mode != "rn":
        return to_f32(odd_sum(p, np.broadcast_to(np.asarray(c, np.float64), p.shape)), mode)
    s = p + c
    low = np.asarray(s).view(np.int64) & 0x1FFFFFFF
    if (low == 0x10000000).any() or (np.abs(s) < 1.2e-38).any():
        s = odd_sum(np.asarray(p), np.broadcast_to(np.asarray(c, np.float64), np.shape(s)))
    return np.asarray(s).astype(np.float32)


def f64_to_bf16(x):
    """bf16 codes of float64 values with one rounding (through a float32 rounded to odd)."""
    f = np.asarray(x).astype(np.float32)
    bits = f.view(np.int32)
    wrong = (f.astype(np.float64) != x) & np.isfinite(f) & ((bits & 1) == 0)
    outward = (np.abs(f.astype(np.float64)) < np.abs(x)) & wrong
    return f32_to_bf16(
        np.where(wrong, bits + np.where(outward, 1, -1), bits).astype(np.int32).view(np.float32)
    )
