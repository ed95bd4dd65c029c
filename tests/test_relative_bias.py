"""A bias by distance: its gradient, whichever of the others are wanted with it."""

from __future__ import annotations

import pytest
import torch
from oracle import Case, check, run, upstream_of

pytestmark = pytest.mark.usefixtures("cpu")

WANTED = (
    ("relative_bias",),
    ("q", "relative_bias"),
    ("v", "relative_bias"),
    ("k", "relative_bias"),
    ("q", "v", "relative_bias"),
    ("q", "k", "v", "relative_bias"),
)
# Across the borders of tiles of queries and of keys; one key tile or several, one unit a head or several.
PADDED = ((130, 300),) * 2
PACKED = ((5, 7), (0, 3), (4, 0), (70, 600), (129, 33))


@pytest.mark.parametrize("wanted", WANTED, ids="+".join)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 1.0},
        {"causal": True, "scale": -0.2},
        {"window": (40, 5)},
        {"softcap": 3.0},
        {"scale": 0.0},
        {"dropout_p": 0.3, "seed": 5},
    ],
    ids=lambda options: "+".join(options),
)
def test_gradient(wanted, packed, options):
    torch.manual_seed(0)
    check(
        Case(
            lengths=PACKED if packed else PADDED,
            packed=packed,
            group=2,
            mask=None if packed else 0.3,
            relative_bias=True,
            wanted=wanted,
            options=options,
        )
    )


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_in_half_precision(dtype, packed):
    torch.manual_seed(0)
    lengths = PACKED if packed else PADDED
    wanted = ("q", "k", "v", "relative_bias")
    check(Case(dtype=dtype, lengths=lengths, packed=packed, relative_bias=True, wanted=wanted))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("sequences", [1, 70], ids=["few", "many"])
def test_any_number_of_threads_gives_the_same_bits(sequences, packed):
    torch.manual_seed(0)
    lengths = ((33, 530),) if sequences == 1 else tuple((9 + b % 7, 300 - b) for b in range(sequences))
    if not packed:
        lengths = lengths[:1] * sequences
    wanted = ("q", "k", "v", "relative_bias")
    case = Case(lengths=lengths, packed=packed, kv_heads=3, relative_bias=True, wanted=wanted)
    tensors = case.tensors()
    upstream = upstream_of(case, tensors)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(case, tensors, upstream, backend="cpu"))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_one_query_of_many_keys():
    """Decoding: few queries, the keys split."""
    torch.manual_seed(0)
    for group in (1, 4):
        for lengths in (((1, 700),) * 2, ((3, 513),)):
            options = {"causal": True, "scale": 1.0}
            check(Case(lengths=lengths, group=group, relative_bias=True, options=options, wanted=("q",)))
