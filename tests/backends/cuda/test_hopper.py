"""The sm_90a kernels as nvcc compiled them, executed and held to the float64 reference.

`make test` runs head dimension 64 in fp16; the slow tests go through the table.
"""

from __future__ import annotations

import math

import pytest
import torch
from oracle import Case, check, run, upstream_of
from test_kernels import DTYPES

import fastattn

KERNEL = "sm907forward"  # as kernels are mangled
BACKWARD = {"dk": "sm9012key_gradient", "dv": "sm9012key_gradient", "dq": "sm9014query_gradient"}
HALF = {"dtype": torch.float16, "kv_heads": 1, "head_dim": 64, "head_dim_v": 64, "wanted": ()}

# Tiles have 128 rows and 128 keys: tails of both, and barriers whose phases come round again.
CASES = {
    "one tile": {"lengths": ((9, 20),)},
    "many steps": {"lengths": ((130, 700),)},
    "causal, keys longer": {"lengths": ((150, 400),), "options": {"causal": True}},
    "causal, queries longer": {"lengths": ((300, 170),), "options": {"causal": True}},
    "window": {"lengths": ((150, 540),), "options": {"window": (200, 10)}},
    "key mask": {"lengths": ((33, 300),) * 2, "mask": 0.5},
    "every key masked": {"lengths": ((10, 20),), "mask": 1.0},
    "no keys": {"lengths": ((20, 0),)},
    "packed, empty sequences": {"lengths": ((0, 5), (140, 170), (3, 0)), "packed": True, "group": 2},
    "packed, causal": {"lengths": ((0, 5), (140, 170), (3, 0)), "packed": True, "options": {"causal": True}},
    "grouped heads, head_dim_v": {
        "lengths": ((20, 140),) * 2, "group": 3, "kv_heads": 2, "head_dim": 40, "head_dim_v": 56,
        "layout": "transposed",
    },
    "unaligned": {"lengths": ((20, 140),), "head_dim": 33, "head_dim_v": 59, "layout": "sliced"},
}  # fmt: skip


def names(device) -> list[str]:
    return [name for name, _ in device.launches]


SLOW = ("window", "key mask", "causal, queries longer", "packed, causal", "unaligned")


@pytest.mark.parametrize(
    "case",
    [pytest.param(CASES[name], id=name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES],
)
def test_forward(simulate, case):
    device = simulate("64", "f16", "plain", 90)
    case = Case(**{**HALF, **case})
    check(case)
    assert any(KERNEL in name for name in names(device))
    assert "sm_90a wgmma" in str(fastattn.explain(**case.tensors(), **case.options, backend="cpu"))


# Steps are 64 queries (dk, dv), and 64 or 128 keys (dq).
GRADIENTS = {
    "causal": {"lengths": ((150, 200),), "options": {"causal": True}},
    "packed, empty sequences": {"lengths": ((0, 5), (70, 150), (3, 0)), "packed": True, "group": 2},
    "of lse too": {"lengths": ((20, 140),), "use_lse": True},
    "values only": {"lengths": ((140, 70),), "wanted": ("v",)},
    "keys only": {"lengths": ((70, 140),), "mask": 0.3, "wanted": ("k",)},
}


@pytest.mark.parametrize("case", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_backward(simulate, case):
    device = simulate("64", "f16", "plain", 90)
    case = Case(**{**HALF, "wanted": ("q", "k", "v"), **case})
    check(case)
    for wanted in case.wanted:
        assert any(BACKWARD[f"d{wanted}"] in name for name in names(device))


TABLE = [(dim, type_) for dim in (64, 128, 256) for type_ in ("f16", "bf16")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [*CASES.values(), *GRADIENTS.values()], ids=[*CASES, *(f"d {n}" for n in GRADIENTS)]
)
@pytest.mark.parametrize(("dim", "type_"), TABLE, ids=[f"{type_}-{dim}" for dim, type_ in TABLE])
def test_every_tile(simulate, dim, type_, case):
    """Every case at each head dimension and type, with all gradients."""
    device = simulate(str(dim), type_, "plain", 90)
    dims = {name: dim - 64 + case.get(name, 64) for name in ("head_dim", "head_dim_v")}
    wanted = case.get("wanted", ("q", "k", "v"))
    with device.recorded() as launches:
        check(Case(**{**HALF, **case, **dims, "dtype": DTYPES[type_], "wanted": wanted}))
    kernels = [name for name, _ in launches if "gradient" in name or "forward" in name]
    assert any(KERNEL in name for name in kernels)
    if not any(keys for _, keys in case["lengths"]):  # dk and dv are empty: there is nothing to launch
        wanted = ("q",)
    assert all(any(BACKWARD[f"d{x}"] in name for name in kernels) for x in wanted)
    assert all("sm90" in name for name in kernels)


@pytest.mark.slow
def test_expanded_tensors_are_not_copied(simulate):
    """Tensor maps have no stride 0: heads and sequences that repeat are an axis less."""
    device = simulate("64", "f16", "plain", 90)
    q = torch.randn(2, 4, 20, 64).half()
    k = torch.randn(1, 1, 150, 64).half().expand(2, 2, 150, 64)
    v = torch.randn(2, 1, 150, 64).half().expand(2, 2, 150, 64)
    out = fastattn.attention(q, k, v, backend="cpu")
    assert len(device.launches) == 1
    expected = fastattn.attention(q.double(), k.double(), v.double(), backend="reference")
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)
    k = torch.randn(2, 2, 1, 64).half().expand(2, 2, 150, 64)
    out = fastattn.attention(q, k, v, backend="cpu")
    expected = fastattn.attention(q.double(), k.double(), v.double(), backend="reference")
    torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("value", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
def test_masked_garbage_does_not_leak(simulate, value):
    """Under a causal mask the last key is seen by the last query only."""
    simulate("64", "f16", "plain", 90)
    case = Case(**{**HALF, "lengths": ((140, 140),), "options": {"causal": True}, "wanted": ("q",)})
    tensors = case.tensors()
    upstream = upstream_of(case, tensors)
    clean = run(case, tensors, upstream, backend="cpu")
    for name in ("k", "v"):
        spoilt = {**tensors, name: tensors[name].clone()}
        spoilt[name][:, :, -1] = value
        results = run(case, spoilt, upstream, backend="cpu")
        for result in ("out", "lse", "dq"):
            rows = (slice(None), slice(None), slice(0, 139))
            torch.testing.assert_close(results[result][rows], clean[result][rows], rtol=2e-3, atol=2e-3)
        assert results["out"][:, :, -1].isnan().all()


def test_a_packed_neighbour_does_not_leak(simulate):
    """Tiles by TMA go on with the rows of the next sequence."""
    simulate("64", "f16", "plain", 90)
    case = Case(**{**HALF, "lengths": ((9, 20), (7, 30)), "packed": True, "wanted": ("q", "k", "v")})
    tensors = case.tensors()
    upstream = upstream_of(case, tensors)
    clean = run(case, tensors, upstream, backend="cpu")
    tensors["q"][9:] = tensors["k"][20:] = tensors["v"][20:] = math.nan
    upstream["out"][9:] = math.nan
    spoilt = run(case, tensors, upstream, backend="cpu")
    for result, rows in {"out": 9, "dq": 9, "dk": 20, "dv": 20}.items():
        assert torch.equal(spoilt[result][:rows], clean[result][:rows]), result


@pytest.mark.parametrize("capability", [80, 100])
def test_other_devices_take_other_kernels(simulate, capability):
    device = simulate("64", "f16", "plain", capability)
    case = Case(**{**HALF, "lengths": ((20, 40),)})
    check(case)
    assert not any(KERNEL in name for name in names(device))
    assert "sm_80 mma.sync" in str(fastattn.explain(**case.tensors(), backend="cpu"))


@pytest.mark.slow
def test_explain_names_the_kernels(simulate):
    """explain() and the launch agree, also where the features or the size call for the sm_80 kernels."""
    device = simulate("64", "f16", "plain;all", 90)
    q = torch.randn(1, 1, 20, 64).half()
    long = torch.randn(1, 1, 1100, 64).half()
    for arguments, hopper in (
        ({}, True),
        ({"causal": True}, True),
        ({"softcap": 5.0}, False),
        ({"dropout_p": 0.3, "seed": 1}, False),
        ({"alibi_slopes": torch.ones(1)}, False),
        ({"scale": -1.0}, False),
    ):
        told = str(fastattn.explain(q, q, q, **arguments, backend="cpu"))
        assert ("sm_90a wgmma" in told) is hopper
        fastattn.attention(q, q, q, **arguments, backend="cpu")
        assert any(KERNEL in name for name in names(device)) is hopper
    device.num_sms = 8  # decoding: keys are split
    assert "sm_80 mma.sync" in str(fastattn.explain(q[:, :, :1], long, long, backend="cpu"))
    fastattn.attention(q[:, :, :1], long, long, backend="cpu")
    assert len(device.launches) == 2
    device.num_sms = 1
    q.requires_grad_()
    assert "(sm_90a wgmma)" in str(fastattn.explain(q, q, q, backend="cpu"))
