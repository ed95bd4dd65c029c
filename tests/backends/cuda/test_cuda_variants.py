"""Every instance of the kernels' table computes what it is for, and is the one that is chosen.

`make test` goes through the variants of one head dimension in fp16; the slow tests through the whole table.
"""

from __future__ import annotations

import re

import pytest
import torch
from oracle import Case, check
from simulated import VARIANTS

DIMS, TYPES = (32, 64, 96, 128, 256), ("f16", "bf16", "f32")
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
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
            "group": 2, "bias": (True, True, True, True), "relative_bias": True, "alibi": "heads", "use_lse": True,
            "wanted": (*GRADIENTS, "bias", "relative_bias"), "options": {"softcap": 10.0, **DRAW},
        },
        EVERYTHING,
    ),
}  # fmt: skip
ONE_EACH = ("plain", "softcap", "dropout", "alibi", "relative", "bias", "everything")


def instances(launches) -> set[tuple[str, str, int, int]]:
    """(kernel, type, head dimension, features) of what was launched of the table."""
    pattern = r"^_ZN8fastattn\d+([a-z_]+)I(?:NS_)?(4Half|8BFloat16|f)E?Li(\d+)ENS_7VariantILj(\d+)E"
    found = (re.match(pattern, name) for name, _ in launches)
    return {(m[1], m[2], int(m[3]), int(m[4])) for m in found if m}


def hold(device, type_: str, dim: int, name: str) -> None:
    fields, features = CASES[name]
    if type_ == "f32" and features:
        features = EVERYTHING
    case = Case(**{
        "dtype": DTYPES[type_], "lengths": ((37, 70),), "kv_heads": 1, "head_dim": dim, "head_dim_v": dim, **fields
    })  # fmt: skip
    with device.recorded() as launches:
        check(case)
    found = instances(launches)
    assert {instance[1:] for instance in found} == {(NAMES[type_], dim, features)}
    biases = {"bias", "relative_bias"} & set(case.wanted)
    expected = {"forward", "key_gradient", "query_gradient"} | ({"score_gradient"} if biases else set())
    assert {kernel for kernel, *_ in found} == expected


@pytest.mark.parametrize("name", ONE_EACH)
def test_variant(simulate, name):
    hold(simulate("32", "f16", VARIANTS), "f16", 32, name)


def possible(type_: str, dim: int, name: str) -> bool:
    """fp32 has no gradient of a bias above head dimension 128, which test_cuda_backend.py sees refused."""
    return type_ != "f32" or dim <= 128 or not {"bias", "relative_bias"} & CASES[name][0].keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("type_", "dim", "name"),
    [
        pytest.param(type_, dim, name, id=f"{type_}-{dim}-{name}")
        for dim in DIMS
        for type_ in TYPES
        for name in CASES
        if possible(type_, dim, name)
    ],
)
def test_every_instance(simulate, type_, dim, name):
    hold(simulate(str(dim), type_, VARIANTS), type_, dim, name)


# What else a plain kernel goes through, for the slow tests to combine with every head dimension and type.
PLAIN = {
    "packed, causal": {"lengths": ((0, 5), (70, 90), (3, 0)), "packed": True, "options": {"causal": True}},
    "window": {"lengths": ((150, 140),), "options": {"window": (40, 10)}},
    "key mask": {"lengths": ((33, 100),) * 2, "mask": 0.5, "group": 2},
    "every key masked": {"lengths": ((10, 20),), "mask": 1.0},
    "no keys": {"lengths": ((20, 0),)},
    "unaligned": {"lengths": ((20, 40),), "narrower": 7, "layout": "sliced"},
    "lse": {"lengths": ((40, 70),), "use_lse": True},
    "queries only": {"lengths": ((70, 40),), "wanted": ("q",)},
    "keys only": {"lengths": ((70, 40),), "wanted": ("k",)},
    "values only": {"lengths": ((70, 40),), "wanted": ("v",)},
}
EVERY = {
    "packed": {
        "lengths": ((33, 70), (0, 3), (50, 20)), "packed": True, "group": 2, "bias": (True, False, True, True),
        "relative_bias": True, "alibi": "heads", "use_lse": True, "layout": "transposed",
        "wanted": (*GRADIENTS, "bias", "relative_bias"),
        "options": {"causal": True, "window": (30, 3), "softcap": 10.0, **DRAW},
    },
    "key mask": {
        "lengths": ((33, 70),) * 2, "mask": 0.5, "alibi": "batch", "relative_bias": True, "narrower": 7,
        "layout": "sliced", "wanted": (*GRADIENTS, "relative_bias"), "options": {"softcap": 10.0, **DRAW},
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [*PLAIN.values(), *EVERY.values()],
    ids=[*PLAIN, *(f"everything, {name}" for name in EVERY)],
)
@pytest.mark.parametrize(
    ("type_", "dim"),
    [pytest.param(type_, dim, id=f"{type_}-{dim}") for dim in DIMS for type_ in TYPES],
)
def test_breadth(simulate, type_, dim, fields):
    simulate(str(dim), type_, VARIANTS)
    fields = dict(fields)
    width = dim - fields.pop("narrower", 0)
    if type_ == "f32" and dim > 128 and "wanted" in fields:
        fields["wanted"] = tuple(name for name in fields["wanted"] if "bias" not in name)
        fields.update({name: None for name in ("bias",) if name in fields}, relative_bias=False)
    check(Case(**{
        "dtype": DTYPES[type_], "kv_heads": 1, "head_dim": width, "head_dim_v": width, **fields
    }))  # fmt: skip
