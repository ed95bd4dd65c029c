"""The kernels as nvcc compiled them, executed and held to the float64 reference.

One head dimension in fp16 here; test_cuda_variants.py goes through the table.
"""

from __future__ import annotations

import math

import pytest
import torch
from oracle import Case, check, run, upstream_of
from simulated import VARIANTS

import fastattn

ALL = ("q", "k", "v", "bias", "relative_bias")
DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
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
    "grouped heads, several unmasked tiles": {"lengths": ((140, 130),), "group": 3},
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
    simulate("64", "f16", VARIANTS)
    check(Case(**{**HALF, **case}))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_masked_garbage_does_not_leak(simulate, value):
    simulate("64", "f16", "plain")
    hold_garbage_back("f16", 64, value)


def hold_garbage_back(type_: str, dim: int, value: float) -> None:
    """Under a causal mask the last key is seen by the last query only, and under a key mask by none."""
    dims = {"dtype": DTYPES[type_], "head_dim": dim, "head_dim_v": dim}
    case = Case(**{**HALF, **dims, "lengths": ((40, 40),), "options": {"causal": True}})
    tensors = case.tensors()
    upstream = upstream_of(case, tensors)
    clean = run(case, tensors, upstream, backend="cpu")
    close = 4 * torch.finfo(case.dtype).eps  # the careful pass masks every tile, and rounds otherwise
    for name in ("k", "v"):
        spoilt = {**tensors, name: tensors[name].clone()}
        spoilt[name][:, :, -1] = value
        results = run(case, spoilt, upstream, backend="cpu")
        for result in ("out", "lse", "dq"):
            rows = (slice(None), slice(None), slice(0, 39))
            torch.testing.assert_close(results[result][rows], clean[result][rows], rtol=close, atol=close)
    assert run(case, spoilt, upstream, backend="cpu")["out"][:, :, -1].isnan().all()

    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[:, 7] = False
    tensors["k"][:, :, 7] = tensors["v"][:, :, 7] = value
    out = fastattn.attention(**tensors, key_mask=mask, backend="cpu")
    tensors["k"][:, :, 7] = tensors["v"][:, :, 7] = 0.0
    assert torch.equal(out, fastattn.attention(**tensors, key_mask=mask, backend="cpu"))
