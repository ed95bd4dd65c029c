"""The kernels as nvcc compiled them, executed and held to the float64 reference.

`make test` runs one head dimension in fp16, every feature at least once; the slow tests go through the table.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracle import Case, check, run, upstream_of

import fastattn

ALL = ("q", "k", "v", "bias", "relative_bias")
HALF = {"dtype": torch.float16, "kv_heads": 1, "head_dim": 64, "head_dim_v": 64}

# Small, and odd on purpose: tails of rows, keys and head dimensions, several tiles, tiles skipped and full.
PLAIN = {
    "one tile": {"lengths": ((9, 20),)},
    "several tiles": {"lengths": ((70, 150),)},
    "causal, keys longer": {"lengths": ((70, 150),), "options": {"causal": True}},
    "causal, queries longer": {"lengths": ((90, 40),), "options": {"causal": True}},
    "window": {"lengths": ((150, 140),), "options": {"window": (40, 10)}},
    "key mask": {"lengths": ((33, 100),) * 2, "mask": 0.5},
    "every key masked": {"lengths": ((10, 20),), "mask": 1.0},
    "packed, empty sequences": {"lengths": ((0, 5), (40, 70), (3, 0)), "packed": True},
    "grouped heads, head_dim_v": {
        "lengths": ((20, 40),),
        "group": 3,
        "head_dim": 40,
        "head_dim_v": 24,
        "use_lse": True,
    },
    "unaligned": {"lengths": ((20, 40),), "head_dim": 33, "head_dim_v": 17, "layout": "sliced"},
    "values only": {"lengths": ((20, 40),), "wanted": ("v",)},
    "queries only": {"lengths": ((20, 40),), "wanted": ("q",)},
}
EVERYTHING = {
    "softcap": {"lengths": ((20, 70),), "options": {"softcap": 5.0}},
    "negative scale": {"lengths": ((20, 30),), "options": {"scale": -0.2}},
    "scale 0": {"lengths": ((20, 30),), "mask": 0.5, "options": {"scale": 0.0}},
    "bias": {"lengths": ((20, 70),), "bias": (True, True, True, True), "wanted": ALL[:4]},
    "bias of one row": {"lengths": ((70, 40),) * 2, "bias": (False, True, False, True), "wanted": ALL[:4]},
    "relative bias": {"lengths": ((70, 100),) * 2, "relative_bias": True, "wanted": (*ALL[:3], ALL[4])},
    "alibi": {"lengths": ((20, 70),), "alibi": "batch"},
    "dropout": {"lengths": ((20, 150),), "options": {"dropout_p": 0.3, "seed": 2**63 + 5}},
    "all at once": {
        "lengths": ((33, 70), (50, 20)), "packed": True, "group": 2, "bias": (True, False, True, True),
        "relative_bias": True, "alibi": "heads", "wanted": ALL, "use_lse": True,
        "options": {"causal": True, "window": (30, 3), "softcap": 10.0, "dropout_p": 0.2, "seed": 7},
    },
}  # fmt: skip


@pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN.keys())
def test_plain(simulate, case):
    simulate("64", "f16", "plain")
    check(Case(**{**HALF, **case}))


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERYTHING.values(), ids=EVERYTHING.keys())
def test_everything(simulate, case):
    simulate("64", "f16", "plain;all")
    check(Case(**{**HALF, **case}))


def test_split_keys(simulate):
    """Few queries on a large device: the keys are divided, and a merge launched."""
    device = simulate("64", "f16", "plain")
    device.num_sms = 4
    check(Case(**{**HALF, "lengths": ((1, 1100),), "group": 2, "wanted": (), "mask": 0.3}))
    names = [name for name, _ in device.launches]
    assert len(names) == 2
    assert "combine" in names[1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_masked_garbage_does_not_leak(simulate, value):
    """Under a causal mask the last key is seen by the last query only, and under a key mask by none."""
    simulate("64", "f16", "plain")
    case = Case(**{**HALF, "lengths": ((40, 40),), "options": {"causal": True}, "wanted": ("q", "k", "v")})
    tensors = case.tensors()
    upstream = upstream_of(case, tensors)
    clean = run(case, tensors, upstream, backend="cpu")
    for name in ("k", "v"):
        spoilt = {**tensors, name: tensors[name].clone()}
        spoilt[name][:, :, -1] = value
        results = run(case, spoilt, upstream, backend="cpu")
        for result in ("out", "lse", "dq"):
            rows = (slice(None), slice(None), slice(0, 39))
            torch.testing.assert_close(results[result][rows], clean[result][rows], rtol=2e-3, atol=2e-3)
    assert run(case, spoilt, upstream, backend="cpu")["out"][:, :, -1].isnan().all()

    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[:, 7] = False
    tensors["k"][:, :, 7] = tensors["v"][:, :, 7] = value
    out = fastattn.attention(**tensors, key_mask=mask, backend="cpu")
    tensors["k"][:, :, 7] = tensors["v"][:, :, 7] = 0.0
    assert torch.equal(out, fastattn.attention(**tensors, key_mask=mask, backend="cpu"))


def test_no_bank_conflicts(simulate):
    """Operands are loaded and tiles filled without two lanes waiting for one bank."""
    device = simulate("64", "f16", "plain")
    device.options = type(device.options)(statistics=True)
    case = Case(**{**HALF, "lengths": ((128, 128),)})
    check(case)
    for name, report in device.launches:
        assert not report.bank_conflicts(), (name, report.bank_conflicts())


TABLE = list(itertools.product((32, 64, 96, 128, 256), ("f16", "bf16", "f32")))
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "type_"), TABLE, ids=[f"{type_}-{dim}" for dim, type_ in TABLE])
def test_every_tile(simulate, dim, type_):
    """Each head dimension and type, plain and with everything, across tile borders."""
    simulate(str(dim), type_, "plain;all")
    base = {
        "dtype": DTYPES[type_],
        "kv_heads": 1,
        "head_dim": dim,
        "head_dim_v": dim,
        "lengths": ((70, 140),),
    }
    check(Case(**base, options={"causal": True}))
    wanted = ALL if dim < 256 or type_ != "f32" else ALL[:3]
    check(
        Case(
            **{**base, "lengths": ((40, 70),)},
            group=2,
            bias=(True, True, True, True) if len(wanted) > 3 else None,
            relative_bias=len(wanted) > 3,
            alibi="heads",
            wanted=wanted,
            use_lse=True,
            options={"softcap": 10.0, "dropout_p": 0.2, "seed": 3},
        )
    )
