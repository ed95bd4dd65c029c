"""Every instance of the kernels' table computes what it is for, and is the one that is chosen.

`make test` goes through the variants of one head dimension in fp16; the slow tests through the whole table.
"""

from __future__ import annotations

import itertools
import math
import re

import pytest
from oracle import Case, check
from simulated import VARIANTS
from test_kernels import DTYPES, hold_garbage_back

TABLE = list(itertools.product((32, 64, 96, 128, 256), ("f16", "bf16", "f32")))
NAMES = {"f16": "4Half", "bf16": "8BFloat16", "f32": "f"}  # as types are mangled
SOFTCAP, BIAS, RELATIVE, ALIBI, DROPOUT = 1, 2, 4, 8, 16  # bits of a variant, csrc/cuda/params.h
EVERYTHING = 31
GRADIENTS = ("q", "k", "v")
DRAW = {"dropout_p": 0.2, "seed": 3}

# A case, and the features of the 16-bit instance that is to serve it; in fp32 there are 0 and EVERYTHING.
CASES = {
    "plain": ({}, 0),
    "softcap": ({"options": {"softcap": 5.0}}, SOFTCAP),
    "dropout": ({"options": DRAW}, DROPOUT),
    "alibi": ({"alibi": "batch", "options": {"causal": True}}, ALIBI | DROPOUT),
    "relative": ({"relative_bias": True, "wanted": (*GRADIENTS, "relative_bias")}, RELATIVE | DROPOUT),
    "bias": ({"bias": (True, True, True, True), "wanted": (*GRADIENTS, "bias")}, BIAS | DROPOUT),
    "alibi, dropout": ({"alibi": "heads", "options": DRAW}, ALIBI | DROPOUT),
    "relative, dropout": (
        {"relative_bias": True, "wanted": (*GRADIENTS, "relative_bias"), "options": DRAW}, RELATIVE | DROPOUT,
    ),
    "bias, dropout": (
        {"bias": (True, False, True, True), "wanted": (*GRADIENTS, "bias"), "options": DRAW}, BIAS | DROPOUT,
    ),
    "softcap, dropout": ({"options": {"softcap": 5.0, **DRAW}}, EVERYTHING),
    "alibi, softcap": ({"alibi": "heads", "options": {"softcap": 5.0}}, EVERYTHING),
    "alibi, relative": ({"alibi": "heads", "relative_bias": True}, EVERYTHING),
    "negative scale": ({"options": {"scale": -0.2}}, EVERYTHING),
    "everything": (
        {
            "group": 2, "bias": (True, True, True, True), "relative_bias": True, "alibi": "heads",
            "use_lse": True, "wanted": (*GRADIENTS, "bias", "relative_bias"),
            "options": {"softcap": 10.0, **DRAW},
        },
        EVERYTHING,
    ),
}  # fmt: skip
ONE_EACH = ("plain", "softcap", "dropout", "alibi", "relative", "bias", "everything")
FP32 = ("plain", "alibi, softcap", "everything")


def instances(launches) -> set[tuple[str, str, int, int]]:
    """(kernel, type, head dimension, features) of what was launched of the table."""
    pattern = r"^_ZN8fastattn\d+([a-z_]+)I(?:NS_)?(4Half|8BFloat16|f)E?Li(\d+)ENS_7VariantILj(\d+)E"
    found = (re.match(pattern, name) for name, _ in launches)
    return {(m[1], m[2], int(m[3]), int(m[4])) for m in found if m}


def hold(device, type_: str, dim: int, name: str) -> None:
    fields, features = CASES[name]
    if type_ == "f32" and features:
        features = EVERYTHING
    dims = {"kv_heads": 1, "head_dim": dim, "head_dim_v": dim}
    case = Case(**{"dtype": DTYPES[type_], "lengths": ((37, 70),), **dims, **fields})
    with device.recorded() as launches:
        check(case)
    found = instances(launches)
    assert {instance[1:] for instance in found} == {(NAMES[type_], dim, features)}
    biases = {"bias", "relative_bias"} & set(case.wanted)
    expected = {"forward", "key_gradient", "query_gradient"} | ({"score_gradient"} if biases else set())
    assert {kernel for kernel, *_ in found} == expected


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ONE_EACH else pytest.mark.slow) for name in CASES]
)
def test_variant(simulate, name):
    hold(simulate("32", "f16", VARIANTS), "f16", 32, name)


def possible(type_: str, dim: int, fields: dict) -> bool:
    """fp32 has no gradient of a bias above head dimension 128, which test_cuda_backend.py sees refused."""
    return type_ != "f32" or dim <= 128 or not {"bias", "relative_bias"} & fields.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("type_", "dim", "name"),
    [
        pytest.param(type_, dim, name, id=f"{type_}-{dim}-{name}")
        for dim, type_ in TABLE
        for name in (ONE_EACH if type_ != "f32" else FP32)
        if possible(type_, dim, CASES[name][0])
    ],
)
def test_every_instance(simulate, type_, dim, name):
    hold(simulate(str(dim), type_, VARIANTS), type_, dim, name)


# What else kernels go through, to be combined with every head dimension and type.
BREADTH = {
    "packed, causal": {
        "lengths": ((0, 5), (70, 90), (3, 0)), "packed": True, "use_lse": True, "options": {"causal": True},
    },
    "window, unaligned, queries only": {
        "lengths": ((70, 90),), "narrower": 7, "layout": "sliced", "wanted": ("q",),
        "options": {"window": (40, 10)},
    },
    "key mask, keys only": {"lengths": ((33, 100),) * 2, "mask": 0.5, "group": 2, "wanted": ("k",)},
    "every key masked": {"lengths": ((10, 20),), "mask": 1.0},
    "causal, several tiles": {"lengths": ((140, 150),), "options": {"causal": True}},
    "grouped heads, several unmasked tiles": {"lengths": ((140, 130),), "group": 2, "alibi": "heads"},
    "grouped heads, several unmasked tiles, dropout": {"lengths": ((140, 130),), "group": 2, "options": DRAW},
    "no keys, values only": {"lengths": ((20, 0),), "wanted": ("v",)},
    "everything, packed": {
        "lengths": ((33, 70), (0, 3), (50, 20)), "packed": True, "group": 2, "layout": "transposed",
        "bias": (True, False, True, True), "relative_bias": True, "alibi": "heads", "use_lse": True,
        "wanted": (*GRADIENTS, "bias", "relative_bias"),
        "options": {"causal": True, "window": (30, 3), "softcap": 10.0, **DRAW},
    },
    "alibi, softcap, dropout, key mask": {
        "lengths": ((33, 70),) * 2, "mask": 0.5, "alibi": "batch", "narrower": 7, "layout": "sliced",
        "options": {"softcap": 10.0, **DRAW},
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("type_", "dim", "name"),
    [
        pytest.param(type_, dim, name, id=f"{type_}-{dim}-{name}")
        for dim, type_ in TABLE
        for name in BREADTH
        if possible(type_, dim, BREADTH[name])
    ],
)
def test_breadth(simulate, type_, dim, name):
    simulate(str(dim), type_, VARIANTS)
    fields = dict(BREADTH[name])
    width = dim - fields.pop("narrower", 0)
    check(Case(dtype=DTYPES[type_], kv_heads=1, head_dim=width, head_dim_v=width, **fields))


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "type_"), TABLE, ids=[f"{type_}-{dim}" for dim, type_ in TABLE])
def test_masked_garbage_does_not_leak(simulate, type_, dim):
    simulate(str(dim), type_, VARIANTS)
    hold_garbage_back(type_, dim, math.nan)
