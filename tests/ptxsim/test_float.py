"""Arithmetic and conversions against exact rationals rounded by hand."""

from fractions import Fraction

import numpy as np
import pytest

from . import rounding
from .harness import elementwise

RNG = np.random.default_rng()
F32 = np.array(
    [0, -0.0, 1, -1, 1e-45, 1e-38, -1e-40, 3e38, np.inf, -np.inf, np.nan, 1 + 2**-23, 0.1], np.float32
)


def floats(n=256):
    random = RNG.integers(0, 2**32, n - len(F32), dtype=np.uint32).view(np.float32)
    plain = RNG.standard_normal(n // 2).astype(np.float32)
    return RNG.permutation(np.r_[F32, random, plain][:n]).astype(np.float32)


def nearest(x, mantissa, low, high, mode="rn"):
    """The Fraction of the format (mantissa bits, exponents low..high) that x rounds to; None for overflow."""
    if x == 0:
        return x
    e = 0
    magnitude = abs(x)
    e = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** e > magnitude:
        e -= 1
    step = Fraction(2) ** (max(e, low) - mantissa)
    floor = magnitude // step
    rest = magnitude - floor * step
    up = {"rn": rest * 2 > step or (rest * 2 == step and floor % 2), "rz": False, "rna": rest * 2 >= step,
          "rm": x < 0 and rest > 0, "rp": x > 0 and rest > 0}[mode]  # fmt: skip
    result = (floor + bool(up)) * step
    return None if result >= Fraction(2) ** (high + 1) else result * (1 if x > 0 else -1)


FORMATS = {"f16": (10, -14, 15), "bf16": (7, -126, 127), "f32": (23, -126, 127), "tf32": (10, -126, 127)}


def value_of(code, fmt):
    code = np.asarray(code)
    if fmt == "f16":
        return float(code.astype(np.uint16).view(np.float16))
    if fmt == "bf16":
        return float(rounding.bf16_to_f32(code.astype(np.uint16)))
    return float(code.astype(np.uint32).view(np.float32))


def assert_rounds(codes, exact, fmt, mode):
    mantissa, low, high = FORMATS[fmt]
    for code, x in zip(codes, exact, strict=True):
        got = value_of(code, fmt)
        if np.isnan(x):
            assert np.isnan(got)
        elif np.isinf(x):
            assert got == x
        else:
            want = nearest(Fraction(float(x)), mantissa, low, high, mode)
            if want is not None:
                assert Fraction(got) == want, (x, got, float(want))
            elif mode in ("rn", "rna") or (mode == "rm" and x < 0) or (mode == "rp" and x > 0):
                assert np.isinf(got), (x, got)
            else:
                assert np.isfinite(got), (x, got)
        assert np.isnan(x) or np.signbit(got) == np.signbit(x)


@pytest.mark.parametrize("mode", ["rn", "rz"])
@pytest.mark.parametrize("fmt", ["f16", "bf16"])
def test_narrowing_conversions_are_exact(fmt, mode):
    x = floats()
    assert_rounds(elementwise(f"cvt.{mode}.{fmt}.f32 %0, %1;", np.uint16, x), x, fmt, mode)


def test_tf32_rounds_ties_away():
    x = floats()
    x[:4] = np.array([0x3F801000, 0x3F803000, 0x3F800FFF, 0xBF801000], np.uint32).view(np.float32)
    assert_rounds(elementwise("cvt.rna.tf32.f32 %0, %1;", np.uint32, x), x, "tf32", "rna")


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_f64_to_f32(mode):
    x = np.r_[floats(64).astype(np.float64), RNG.standard_normal(64) * 10.0 ** RNG.integers(-44, 39, 64)]
    assert_rounds(elementwise(f"cvt.{mode}.f32.f64 %0, %1;", np.uint32, x), x, "f32", mode)


@pytest.mark.parametrize(("pair", "fmt"), [("f16x2", "f16"), ("bf16x2", "bf16")])
def test_pairs_put_the_first_source_on_top(pair, fmt):
    high, low = floats(), floats()
    codes = elementwise(f"cvt.rn.{pair}.f32 %0, %1, %2;", np.uint32, high, low)
    assert_rounds(codes >> 16, high, fmt, "rn")
    assert_rounds(codes & 0xFFFF, low, fmt, "rn")


@pytest.mark.parametrize("fmt", ["f16", "bf16"])
def test_widening_is_exact_for_every_code(fmt):
    codes = RNG.permutation(np.arange(65536, dtype=np.uint16))[:1024]
    got = elementwise(f"cvt.f32.{fmt} %0, %1;", np.float32, codes)
    want = (
        codes.view(np.float16).astype(np.float32)
        if fmt == "f16"
        else (codes.astype(np.uint32) << 16).view(np.float32)
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_fma_rounds_once(mode):
    a, b = (RNG.standard_normal(512).astype(np.float32) for _ in range(2))
    c = np.where(RNG.random(512) < 0.5, -(a * b), RNG.standard_normal(512) * 1e8).astype(np.float32)
    got = elementwise(f"fma.{mode}.f32 %0, %1, %2, %3;", np.float32, a, b, c)
    for x, y, z, d in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        assert Fraction(d) == nearest(Fraction(x) * Fraction(y) + Fraction(z), *FORMATS["f32"], mode)


def test_fma_in_a_tie_of_the_float64_sum():
    # 1 + 2^-24 is halfway between floats; the tiny product breaks the tie, and float64 alone would lose it.
    a = np.array([2.0**-24, 2.0**-24, -(2.0**-60)], np.float32)
    b = np.array([1 + 2.0**-23, 1.0, 1.0], np.float32)
    c = np.array([1.0, 1.0, 1 + 2.0**-23], np.float32)
    got = elementwise("fma.rn.f32 %0, %1, %2, %3;", np.float32, a, b, c)
    assert got.tolist() == [1 + 2.0**-23, 1.0, 1 + 2.0**-23]


@pytest.mark.parametrize("fmt", ["f16", "bf16"])
def test_half_fma_rounds_once(fmt):
    codes = [
        RNG.integers(0x2800, 0x5000, 512).astype(np.uint16)
        | (RNG.integers(0, 2, 512) << 15).astype(np.uint16)
        for _ in range(3)
    ]
    got = elementwise(f"fma.rn.{fmt} %0, %1, %2, %3;", np.uint16, *codes)
    for a, b, c, d in zip(*codes, got, strict=True):
        exact = Fraction(value_of(a, fmt)) * Fraction(value_of(b, fmt)) + Fraction(value_of(c, fmt))
        want = nearest(exact, *FORMATS[fmt])
        assert want is None or Fraction(value_of(d, fmt)) == want


@pytest.mark.parametrize(("op", "function"), [("add", np.add), ("mul", np.multiply), ("sub", np.subtract)])
def test_packed_halves_and_pairs_of_floats(op, function):
    a, b = (RNG.standard_normal((64, 2)).astype(np.float16) for _ in range(2))
    got = elementwise(
        f"{op}.f16x2 %0, %1, %2;", np.uint32, a.view(np.uint32).ravel(), b.view(np.uint32).ravel()
    )
    np.testing.assert_array_equal(got.view(np.float16).reshape(-1, 2), function(a, b))
    x, y = (RNG.standard_normal((64, 2)).astype(np.float32) for _ in range(2))
    got = elementwise(
        f"{op}.rn.f32x2 %0, %1, %2;", np.uint64, x.view(np.uint64).ravel(), y.view(np.uint64).ravel()
    )
    np.testing.assert_array_equal(got.view(np.float32).reshape(-1, 2), function(x, y))


def test_min_max_and_nan():
    a, b = floats(), floats()
    np.testing.assert_array_equal(elementwise("max.f32 %0, %1, %2;", np.float32, a, b), np.fmax(a, b))
    np.testing.assert_array_equal(elementwise("min.NaN.f32 %0, %1, %2;", np.float32, a, b), np.minimum(a, b))


def test_unordered_comparisons():
    a, b = floats(), floats()
    nan = np.isnan(a) | np.isnan(b)
    for name, want in (
        ("lt", a < b),
        ("ltu", (a < b) | nan),
        ("ne", (a != b) & ~nan),
        ("neu", a != b),
        ("num", ~nan),
        ("nan", nan),
    ):
        got = elementwise(f"setp.{name}.f32 %p1, %1, %2; selp.b32 %0, 1, 0, %p1;", np.uint32, a, b)
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_ftz_flushes_inputs_and_outputs():
    a = np.array([1e-40, -1e-40, 1e-38, 2e-38], np.float32)
    got = elementwise("mul.ftz.f32 %0, %1, %2;", np.float32, a, np.array([1e30, 1e30, 1e-3, 1.0], np.float32))
    assert got.tolist() == [0.0, -0.0, 0.0, np.float32(2e-38)]
    assert np.signbit(got).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("op", "function"),
    [("ex2.approx", np.exp2), ("lg2.approx", np.log2), ("rcp.approx", lambda x: 1 / x), ("rsqrt.approx", lambda x: x**-0.5),
     ("sqrt.rn", np.sqrt), ("tanh.approx", np.tanh), ("sin.approx", np.sin), ("cos.approx", np.cos)],
)  # fmt: skip
def test_functions(op, function):
    x = (RNG.random(256) * 8 + 0.01).astype(np.float32)
    got = elementwise(f"{op}.f32 %0, %1;", np.float32, x)
    np.testing.assert_allclose(got, function(x.astype(np.float64)), rtol=2e-7, atol=1e-7)


def test_float_to_integer_saturates_and_rounds():
    x = np.array([2.5, -2.5, 3.5, 1e20, -1e20, np.nan, 0.49999997, -0.7], np.float32)
    for mode, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        got = elementwise(f"cvt.{mode}.s32.f32 %0, %1;", np.int32, x)
        want = [
            int(v) for v in np.clip(np.nan_to_num(function(x.astype(np.float64)), nan=0), -(2**31), 2**31 - 1)
        ]
        assert got.tolist() == want


def test_integer_conversions():
    x = RNG.integers(-(2**53), 2**53, 64)
    assert_rounds(elementwise("cvt.rn.f32.s64 %0, %1;", np.uint32, x), x, "f32", "rn")
    y = RNG.integers(0, 2**32, 64, dtype=np.uint32)
    np.testing.assert_array_equal(
        elementwise("cvt.s64.s32 %0, %1;", np.int64, y), y.view(np.int32).astype(np.int64)
    )
    np.testing.assert_array_equal(elementwise("cvt.u64.u32 %0, %1;", np.uint64, y), y.astype(np.uint64))
    np.testing.assert_array_equal(
        elementwise("cvt.s32.s8 %0, %1;", np.int32, y), y.astype(np.uint8).view(np.int8)
    )
    np.testing.assert_array_equal(
        elementwise("cvt.sat.u8.s32 %0, %1;", np.uint32, y), np.clip(y.view(np.int32), 0, 255)
    )


def test_int64_to_f32_has_no_double_rounding():
    x = np.array([(1 << 62) + (1 << 38) + 1, (1 << 62) + (1 << 38), (1 << 62) + (1 << 38) - 1], np.int64)
    got = elementwise("cvt.rn.f32.s64 %0, %1;", np.float32, x)
    assert got.tolist() == [2.0**62 + 2.0**39, 2.0**62, 2.0**62]
