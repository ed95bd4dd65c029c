"""The rule itself: PyTorch's own arithmetic passes, and nothing that is wrong in a way kernels go wrong."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from oracle import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EVERYTHING = ("q", "k", "v", "bias", "relative_bias")

CASES = {
    "square": Case(lengths=((64, 64),), head_dim=64, head_dim_v=64),
    "long": Case(lengths=((70, 600),), kv_heads=1, head_dim=64, head_dim_v=64, use_lse=True),
    "causal": Case(lengths=((300, 300),), kv_heads=1, head_dim=32, head_dim_v=32, options={"causal": True}),
    "decode": Case(lengths=((1, 1500),), group=3, head_dim=64, head_dim_v=64),
    "grouped": Case(lengths=((70, 129),), group=4, head_dim=80, head_dim_v=40, options={"window": (50, 20)}),
    "masked": Case(lengths=((33, 300),) * 2, mask=0.5, head_dim=128, head_dim_v=128),
    "packed": Case(lengths=((70, 300), (0, 4), (5, 7), (129, 33)), packed=True, options={"causal": True}),
    "biases": Case(
        lengths=((40, 290),) * 2, bias=(False, True, True, True), relative_bias=True, wanted=EVERYTHING,
        options={"softcap": 5.0, "dropout_p": 0.2, "seed": 3},
    ),
}  # fmt: skip
WITH_DTYPE = [
    pytest.param(Case(**{**vars(case), "dtype": dtype}), id=f"{name}-{str(dtype)[6:]}")
    for name, case in CASES.items()
    for dtype in DTYPES
]


def expected_of(case: Case) -> tuple[oracle.Expected, dict[str, torch.Tensor]]:
    """What is expected, and results that are it, as well as the dtype can say."""
    expected = oracle.Expected(case, case.tensors())
    rounded = {name: x.float() if name == "lse" else x.to(case.dtype) for name, x in expected.exact.items()}
    return expected, rounded


def refused(
    expected: oracle.Expected, results: dict[str, torch.Tensor], name: str, wrong: torch.Tensor
) -> bool:
    try:
        expected.judge({**results, name: wrong.to(results[name].dtype)})
    except AssertionError as error:
        return str(error).startswith(name)
    return False


def typical_rows(x: torch.Tensor) -> list[tuple[int, ...]]:
    """Indices of a row of median size among those that hold anything, and of one of the lower quartile."""
    sizes = x.double().masked_fill(x.isinf(), 0.0).norm(dim=-1)
    found = sizes.flatten().argsort()[-int((sizes > 0).sum()) :]
    chosen = found[[len(found) // 2, len(found) // 4]]
    return [tuple(int(i) for i in torch.unravel_index(at, sizes.shape)) for at in chosen]


@pytest.mark.parametrize("case", WITH_DTYPE)
def test_wrong_results_are_refused(case):
    expected, results = expected_of(case)
    expected.judge(results)
    expected.judge({**expected.plain, "lse": results["lse"]})
    for name, right in results.items():
        if name == "lse":  # whose rows are single numbers
            right = right[..., None]
        first, second = typical_rows(right)
        wrong = {kind: right.clone() for kind in ("one element off", "one row zero", "swapped", "NaN")}
        wrong["one element off"][first][right[first].abs().argmax()] *= 0.5
        wrong["one row zero"][first] = 0.0
        wrong["swapped"][first], wrong["swapped"][second] = right[second], right[first]
        wrong["NaN"][first] = math.nan
        wrong |= {"zeros": torch.zeros_like(right), "10% more": 1.1 * right, "10% less": 0.9 * right}
        for kind, result in wrong.items():
            assert refused(expected, results, name, result.view(results[name].shape)), f"{name}: {kind}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropped", [slice(256, 512), slice(64, 96)], ids=["256 keys", "32 keys"])
def test_a_tile_of_keys_left_out_is_refused(dtype, dropped):
    """By the forward pass, and by each of the sums of the backward alone, where P and lse are right."""
    case = Case(dtype=dtype, lengths=((70, 600),), kv_heads=1, head_dim=64, head_dim_v=64)
    tensors = case.tensors()
    expected = oracle.Expected(case, tensors)
    results = {name: x.to(torch.float32 if name == "lse" else dtype) for name, x in expected.exact.items()}
    mask = torch.ones(1, 600, dtype=torch.bool)
    mask[:, dropped] = False
    without = oracle.run(
        case, {**tensors, "key_mask": mask}, expected.upstream, backend="reference", dtype=torch.float64
    )
    for name in results:
        assert refused(expected, results, name, without[name]), name
    whole_bias = {**tensors, "bias": torch.zeros(1, 1, 70, 600, dtype=torch.float64)}
    of_scores = Case(**{**vars(case), "wanted": ("bias",)})
    dscores = oracle.run(of_scores, whole_bias, expected.upstream, backend="reference", dtype=torch.float64)[
        "dbias"
    ]
    torch.testing.assert_close(dscores @ tensors["k"].double() / 8, expected.exact["dq"])
    kept = dscores * mask
    assert refused(expected, results, "dq", kept @ tensors["k"].double() / 8)
    rows = dscores.clone()
    rows[:, :, 64:] = 0.0
    assert refused(expected, results, "dk", rows.mT @ tensors["q"].double() / 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_must_be_where_they_belong(dtype):
    case = Case(dtype=dtype, lengths=((40, 20),), options={"causal": True})
    expected, results = expected_of(case)
    seen = results["lse"].masked_fill(results["lse"].isinf(), -1e30)
    assert refused(expected, results, "lse", seen)
