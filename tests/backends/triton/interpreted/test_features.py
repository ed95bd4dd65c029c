"""Every feature, forward and backward, against the float64 reference, at sizes that cross tile borders.

Interpreted tiles are 32x32 (16x32 when decoding), so 37 x 45 has full tiles, tails and, under a window, both
edges.
"""

from dataclasses import replace

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from oracle import Case
from simulated_cases import SEED_ON_DEVICE

ODD = ((37, 70),)
BIASED = ("q", "k", "v", "bias")
ALL = ("q", "k", "v", "bias", "relative_bias")

FEATURES = {
    "plain": Case(lengths=ODD),
    "causal": Case(lengths=ODD, options={"causal": True}),
    # Heads of 64 take pairs of tiles where nothing is masked: two, and a rest of more than one tile.
    "pairs": Case(lengths=((70, 190),), head_dim=64, head_dim_v=64),
    "pairs-causal": Case(lengths=((70, 170),), head_dim=64, head_dim_v=40, options={"causal": True}),
    "pairs-window": Case(lengths=((70, 240),), head_dim=64, options={"window": (150, 30)}),
    "pairs-packed": Case(lengths=((37, 140), (0, 3), (33, 64)), head_dim=64, packed=True),
    "causal-more-queries": Case(lengths=((70, 37),), options={"causal": True}),
    "window": Case(lengths=ODD, options={"window": (9, 4)}),
    "window-left-causal": Case(lengths=((66, 66),), options={"window": (33, None), "causal": True}),
    "key_mask": Case(lengths=ODD * 2, mask=0.4),
    "all-masked": Case(lengths=((5, 7),) * 2, mask=1.0),
    "gqa": Case(lengths=ODD, kv_heads=2, group=3, options={"causal": True}),
    "bias": Case(lengths=ODD * 2, bias=(True, True, True, True), wanted=BIASED),
    "bias-of-keys": Case(lengths=ODD * 2, bias=(True, False, False, True), wanted=BIASED),
    "bias-of-queries": Case(lengths=ODD * 2, bias=(False, True, True, False), wanted=BIASED),
    "bias-of-nothing": Case(lengths=ODD * 2, bias=(False,) * 4, wanted=BIASED),
    "relative_bias": Case(lengths=ODD * 2, relative_bias=True, wanted=("q", "k", "v", "relative_bias")),
    "alibi": Case(lengths=ODD, alibi="batch", options={"causal": True}),
    "softcap": Case(lengths=ODD, options={"softcap": 3.0}),
    "dropout": Case(lengths=((37, 150),), options={"dropout_p": 0.4, "seed": 2**63 + 5}),
    "seed-on-device": Case(lengths=((37, 70),), options={"dropout_p": 0.4, "seed": SEED_ON_DEVICE}),
    "negative-scale": Case(lengths=ODD, options={"scale": -0.3}),
    "zero-scale": Case(lengths=ODD, options={"scale": 0.0}),
    "dims": Case(lengths=((33, 33),), head_dim=40, head_dim_v=96),
    "dims-beyond-128": Case(lengths=((33, 33),), head_dim=136, head_dim_v=200),
    "narrow": Case(lengths=((33, 33),), head_dim=3, head_dim_v=1),
    "dlse": Case(lengths=ODD, use_lse=True),
    "sliced": Case(lengths=((33, 35),) * 2, layout="sliced"),
    "transposed": Case(lengths=((33, 35),), layout="transposed"),
    "packed": Case(lengths=((37, 40), (0, 3), (5, 0), (33, 65)), packed=True, options={"causal": True}),
    "packed-everything": Case(
        lengths=((37, 40), (20, 9)), packed=True, group=2, kv_heads=1, bias=(True, True, True, True),
        relative_bias=True, alibi="heads", wanted=ALL, use_lse=True,
        options={"causal": True, "window": (30, None), "softcap": 5.0, "dropout_p": 0.2, "seed": 3},
    ),
    "everything": Case(
        lengths=((37, 40),) * 2, group=2, kv_heads=1, mask=0.2, bias=(True, False, True, True),
        relative_bias=True, alibi="heads", wanted=ALL, use_lse=True,
        options={"causal": True, "window": (30, None), "softcap": 5.0, "dropout_p": 0.2, "seed": 3},
    ),
    "decode": Case(lengths=((1, 600),), kv_heads=1, group=4, wanted=()),
    "decode-window": Case(
        lengths=((3, 700),), kv_heads=1, group=2, wanted=(), mask=0.2, alibi="heads", bias=(True,) * 4,
        options={"causal": True, "window": (530, None), "dropout_p": 0.1, "seed": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_feature(name, poisoned):
    oracle.check(FEATURES[name], "triton")


HALF = {
    f"{dtype}-{name}": replace(FEATURES[name], dtype=getattr(torch, dtype))
    for dtype in ("bfloat16", "float16")
    for name in ("plain", "everything")
}
MORE_IN_HALF = {
    f"{dtype}-{name}": replace(FEATURES[name], dtype=getattr(torch, dtype))
    for dtype in ("bfloat16", "float16")
    for name in FEATURES
    if name not in ("plain", "everything")
} | {
    f"{dtype}-head_dim-{dim}": Case(getattr(torch, dtype), ((33, 40),), head_dim=dim, head_dim_v=dim)
    for dtype in ("bfloat16", "float16", "float32")
    for dim in (128, 256)
}  # fmt: skip


SUBSETS = {
    "-".join(wanted): Case(
        lengths=((33, 40),), bias=(False, True, True, True), relative_bias=True, wanted=wanted
    )
    for wanted in (("q",), ("k",), ("v",), ("k", "v"), ("bias",), ("q", "v"), ("relative_bias",))
}


def every_case() -> list[Case]:
    """For ../proof_matrix.py."""
    return [*FEATURES.values(), *HALF.values(), *MORE_IN_HALF.values(), *SUBSETS.values()]


@pytest.mark.parametrize("name", HALF)
def test_dtype(name, poisoned):
    oracle.check(HALF[name], "triton")


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_IN_HALF)
def test_more_of_each_dtype(name, poisoned):
    oracle.check(MORE_IN_HALF[name], "triton")


@pytest.mark.parametrize("name", SUBSETS)
def test_subset_of_gradients(name, poisoned):
    oracle.check(SUBSETS[name], "triton")


def smaller(case: Case) -> Case:
    """At most two sequences of at most 70: an interpreter takes a millisecond for each line of a program."""
    lengths = tuple((min(queries, 70), min(keys, 70)) for queries, keys in case.lengths[:2])
    return replace(case, lengths=lengths, kv_heads=1)


@pytest.mark.timeout(900)
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(oracle.cases())
def test_some_combinations(case):
    oracle.check(smaller(case), "triton")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(oracle.cases())
def test_any_combination(case):
    oracle.check(case, "triton")
