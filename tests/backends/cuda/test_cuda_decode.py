"""Few queries and many keys: the keys are divided, and a second kernel merges the parts."""

from __future__ import annotations

import pytest
import torch
from oracle import Case, check
from simulated import VARIANTS
from test_cuda_variants import DTYPES, NAMES, TABLE

import fastattn

HALF = {"dtype": torch.float16, "kv_heads": 1, "head_dim": 64, "head_dim_v": 64, "wanted": ()}
EVERYTHING = {
    "group": 2, "bias": (True, True, False, True), "relative_bias": True, "alibi": "heads",
    "options": {"causal": True, "window": (400, None), "softcap": 10.0, "dropout_p": 0.2, "seed": 3},
}  # fmt: skip
CASES = {
    "mask": {"lengths": ((1, 1100),), "group": 2, "mask": 0.3},
    "packed": {"lengths": ((1, 600), (0, 9), (3, 70), (2, 0)), "packed": True},
    "window": {"lengths": ((5, 700),), "options": {"window": (300, 0)}},
    "rows of several tiles": {"lengths": ((140, 530),), "options": {"causal": True}},
    "narrower values": {"lengths": ((3, 530),), "head_dim_v": 33, "layout": "sliced"},
}
SLOW = ("window", "rows of several tiles", "narrower values")


def split(device, monkeypatch, splits: int, case: Case) -> dict[str, torch.Tensor]:
    """`check`, with the keys in that many parts whatever the device would choose."""
    monkeypatch.setattr(device._library, "fastattn_cuda_num_splits", lambda *_: splits)
    with device.recorded() as launches:
        results = check(case)
    merged = [name for name, _ in launches if "combine" in name]
    assert len(merged) == 1
    assert f"combineI{'' if case.dtype == torch.float32 else 'NS_'}" in merged[0]
    return results


@pytest.mark.parametrize(
    "fields",
    [pytest.param(CASES[name], id=name, marks=pytest.mark.slow if name in SLOW else ()) for name in CASES],
)
def test_split_keys(simulate, monkeypatch, fields):
    split(simulate("64", "f16", "plain"), monkeypatch, 3, Case(**{**HALF, **fields}))


def test_the_device_decides(simulate):
    """Few queries on a large device: parts of four steps and more, as many as there are multiprocessors."""
    device = simulate("64", "f16", "plain")
    q, k = torch.randn(1, 1, 1, 64).half(), torch.randn(1, 1, 1100, 64).half()
    for sms, blocks in ((1, 1), (3, 3), (100, 4)):
        device.num_sms = sms
        fastattn.attention(q, k, k, backend="cpu")
        assert device.launches[0][1].blocks == blocks
    device.num_sms = 1


def test_parts_that_see_nothing(simulate, monkeypatch):
    """More parts than steps; parts whose keys are all masked; rows that see nothing at all."""
    device = simulate("64", "f16", "plain")
    monkeypatch.setattr(device._library, "fastattn_cuda_num_splits", lambda *_: 7)
    q, k, v = (
        torch.randn(2, 2, 3, 64).half(),
        torch.randn(2, 2, 150, 64).half(),
        torch.randn(2, 2, 150, 64).half(),
    )
    mask = torch.zeros(2, 150, dtype=torch.bool)
    mask[0, 70:75] = True
    out, lse = fastattn.attention(q, k, v, key_mask=mask, return_lse=True, backend="cpu")
    wide = (x.double() for x in (q, k, v))
    exact, exact_lse = fastattn.attention(*wide, key_mask=mask, return_lse=True, backend="reference")
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse.double(), exact_lse.double(), rtol=1e-5, atol=1e-5)
    assert not out[1].any()


def test_split_keys_with_everything(simulate, monkeypatch):
    case = Case(**{**HALF, "head_dim": 32, "head_dim_v": 32, "lengths": ((3, 300),), **EVERYTHING})
    split(simulate("32", "f16", VARIANTS), monkeypatch, 3, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [CASES["mask"], {"lengths": ((3, 300),), **EVERYTHING}], ids=["mask", "everything"]
)
@pytest.mark.parametrize(
    ("type_", "dim"), [pytest.param(type_, dim, id=f"{type_}-{dim}") for dim, type_ in TABLE]
)
def test_split_keys_of_every_instance(simulate, monkeypatch, type_, dim, fields):
    device = simulate(str(dim), type_, VARIANTS)
    dims = {"head_dim": dim, "head_dim_v": dim, "dtype": DTYPES[type_]}
    split(device, monkeypatch, 4, Case(**{**HALF, **dims, **fields}))
    assert NAMES[type_] in device.launches[0][0]
