"""Which of the two backends for NVIDIA GPUs comes first: a pure function, and dispatch around it."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import preference_table
import pytest
import torch

import fastattn
from fastattn import dispatch
from fastattn.backends.preference import FIGURES, cuda_first
from fastattn.errors import UnsupportedError
from fastattn.problem import AttentionInputs, AttentionOptions, describe

HALF = torch.float16
MODEL = "preferred by the model, not measured"


def problem(rows=1024, head_dim=64, head_dim_v=None, dtype=HALF, need_grad=True, tensors=None, **options):
    """A problem on a GPU, of tensors that are here."""
    q = torch.empty(1, 2, rows, head_dim, dtype=dtype)
    v = torch.empty(1, 2, rows, head_dim_v or head_dim, dtype=dtype)
    inputs = AttentionInputs(q, q, v, **(tensors or {}))
    given = {
        "causal": False, "softmax_scale": 0.1, "window_left": -1, "window_right": -1, "softcap": 0.0,
        "dropout_p": 0.0, "max_seqlen_q": 0, "max_seqlen_k": 0, **options,
    }  # fmt: skip
    if given["dropout_p"]:
        inputs = inputs._replace(seed=torch.zeros((), dtype=torch.int64))
    found = describe(inputs, AttentionOptions(*given.values()), need_grad)
    return dataclasses.replace(found, device=torch.device("cuda", 0))


@pytest.mark.parametrize(("capability", "dim", "need_grad", "first"), [
    (80, 64, False, "cuda"),
    (80, 64, True, "cuda"),
    (80, 128, False, "cuda"),
    (80, 128, True, "cuda"),
    (90, 64, True, "cuda"),
    (90, 128, True, "cuda"),
    (90, 256, False, "cuda"),
    (90, 256, True, "cuda"),
    (90, 96, True, "cuda"),
    (90, 32, False, "triton"),  # not counted: Hopper's kernels leave it to those of sm_80
    (86, 64, True, "triton"),  # not counted
    (100, 64, True, "triton"),
    (120, 64, True, "triton"),
])  # fmt: skip
def test_plain_attention(capability, dim, need_grad, first):
    for dtype in (HALF, torch.bfloat16):
        reason = cuda_first(problem(head_dim=dim, dtype=dtype, need_grad=need_grad), capability)
        assert (reason is not None) is (first == "cuda"), reason
        if reason is not None:
            assert MODEL in reason
            assert ("backward" in reason) is need_grad


def test_head_dims_belong_to_the_next_tile():
    assert cuda_first(problem(head_dim=40), 90) == cuda_first(problem(head_dim=64), 90) is not None
    assert cuda_first(problem(head_dim=100), 90) == cuda_first(problem(head_dim=128), 90) is not None
    assert cuda_first(problem(head_dim=80), 80) == cuda_first(problem(head_dim=96), 80) is not None
    assert cuda_first(problem(head_dim=64, head_dim_v=128), 80) is None
    assert cuda_first(problem(head_dim=16), 80) is None


@pytest.mark.parametrize(
    "case",
    [
        {"dtype": torch.float32},
        {"rows": 127},
        {"window_left": 40},
        {"window_right": 40},
        {"softmax_scale": -1.0},
        {"tensors": {"key_mask": torch.ones(1, 1024, dtype=torch.bool)}},
        {"tensors": {"bias": torch.zeros(1, 1, 1, 1024)}},
        {"tensors": {"relative_bias": torch.zeros(2, 2047)}},
        {"tensors": {"alibi_slopes": torch.ones(2)}},
        {"softcap": 5.0, "dropout_p": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("capability", [80, 90])
def test_what_was_not_counted_is_tritons(case, capability):
    assert cuda_first(problem(**case), capability) is None
    same = {name: value for name, value in case.items() if name == "rows"}
    assert cuda_first(problem(**{**same, "rows": 1024}), capability) is not None


def test_causal_and_long_runs_of_keys():
    assert cuda_first(problem(causal=True), 80)
    assert cuda_first(problem(rows=256, need_grad=False), 80) is None, "the softmax's base still moves"
    assert cuda_first(problem(rows=512, need_grad=False), 80)


@pytest.mark.parametrize("scores", [{"dropout_p": 0.1}, {"softcap": 30.0}], ids=str)
def test_dropout_and_softcap_where_counted(scores):
    assert cuda_first(problem(**scores), 80)
    assert cuda_first(problem(**scores), 90) is None, "on Hopper they are not wgmma's"


class Fake:
    """A backend that can serve everything, or says why not."""

    def __init__(self, name, refusal=None, capability=80):
        self.name, self.refusal, self._capability = name, refusal, capability

    def supports(self, problem):
        return self.refusal

    def kernel(self, problem):
        return f"{self.name}'s kernel"

    def capability(self, device):
        assert device == torch.device("cuda", 0)
        return self._capability


@pytest.fixture
def backends(monkeypatch):
    """A function that puts these in the place of triton and cuda."""
    monkeypatch.setattr(dispatch, "_chosen", {})

    def use(triton, cuda):
        monkeypatch.setattr(dispatch, "_backends", {"triton": triton, "cuda": cuda, "cpu": "none"})

    return use


def test_cuda_comes_first_where_the_model_says_so(backends):
    backends(Fake("triton"), Fake("cuda"))
    assert dispatch.choose(problem(), "auto").name == "cuda"
    _, refusals = dispatch.survey(problem())
    assert MODEL in refusals["triton"]
    assert "cuda" not in refusals
    assert dispatch.choose(problem(), "triton").name == "triton", (
        "a backend by name is no matter of preference"
    )


def test_triton_comes_first_else(backends):
    backends(Fake("triton"), Fake("cuda", capability=89))
    assert dispatch.choose(problem(), "auto").name == "triton"
    assert dispatch.survey(problem())[1]["cuda"] == "able to, but triton comes first"


@pytest.mark.parametrize("cuda", [Fake("cuda", "refuses"), "not built"], ids=["refuses", "absent"])
def test_where_cuda_cannot_triton_serves(backends, cuda):
    backends(Fake("triton"), cuda)
    first, refusals = dispatch.survey(problem())
    assert first.name == "triton"
    assert refusals["cuda"] in ("refuses", "not built")


@pytest.mark.parametrize("capability", [80, 89], ids=["preferred", "not preferred"])
@pytest.mark.parametrize("triton", [Fake("triton", "refuses"), "absent"], ids=["refuses", "absent"])
def test_where_triton_cannot_cuda_serves(backends, triton, capability):
    backends(triton, Fake("cuda", capability=capability))
    first, refusals = dispatch.survey(problem())
    assert first.name == "cuda"
    assert refusals["triton"] in ("refuses", "absent")


def test_where_neither_can_both_say_why(backends):
    backends(Fake("triton", "too new"), Fake("cuda", "too old"))
    with pytest.raises(UnsupportedError) as caught:
        dispatch.choose(problem(), "auto")
    assert caught.value.reasons["triton"] == "too new"
    assert caught.value.reasons["cuda"] == "too old"


def test_explain_says_that_it_is_a_model(backends, monkeypatch):
    backends(Fake("triton"), Fake("cuda"))
    module = importlib.import_module("fastattn.explain")
    on_gpu = problem()
    monkeypatch.setattr(module, "describe", lambda *_: on_gpu)
    q = torch.empty(1, 2, 1024, 64, dtype=HALF)
    told = str(fastattn.explain(q, q, q))
    assert "computed by cuda (cuda's kernel)" in told
    assert f"not triton: able to, but cuda is {MODEL}" in told


LOOPS = json.loads((Path(__file__).parent / "cuda" / "main_loops.json").read_text())
INSTANCES = {"plain": "0", "dropout": "16", "softcap": "1"}


@pytest.mark.parametrize("key", FIGURES, ids=str)
def test_the_figures_of_cuda_are_those_counted(key):
    """By cuda/test_statistics.py, which holds its table to what nvcc makes."""
    capability, dim, scores = key
    hopper = capability == 90
    tile = 128 if hopper and dim == 96 else dim  # Hopper's kernels pad it
    kernels = LOOPS[f"sm_90a Half {tile}" if hopper else f"Half {dim} {INSTANCES[scores]}"]
    loops = {name: kernel["main_loop"] for name, kernel in kernels.items()}
    moving = kernels["forward"]["jumped_over"]
    figures = FIGURES[key][1]
    cycles = loops["forward"]["tensor_cycles"] * dim / tile
    assert figures.forward == pytest.approx((loops["forward"]["instructions"] - moving) / cycles, abs=0.006)
    assert figures.moving == pytest.approx(moving / cycles, abs=0.006)
    dq = loops["query_gradient"]
    assert figures.dq == pytest.approx(dq["instructions"] / (dq["tensor_cycles"] * dim / tile), abs=0.006)
    if "key_gradient" in loops:
        instructions, cycles = (loops["key_gradient"][name] for name in ("instructions", "tensor_cycles"))
    else:  # apart they compute a product of the four twice: dk three, dv two
        dk, dv = loops["key_gradient dk"], loops["key_gradient dv"]
        instructions, cycles = dk["instructions"] + dv["instructions"], dk["tensor_cycles"] / 3 * 4
    assert figures.dkdv == pytest.approx(instructions / (cycles * dim / tile), abs=0.006)


@pytest.mark.slow
@pytest.mark.parametrize("key", FIGURES, ids=str)
def test_the_figures_of_triton_are_those_counted(key):
    pytest.importorskip("triton")
    from fastattn.backends.triton import compile as triton_compile

    capability, dim, scores = key
    features = frozenset() if scores == "plain" else frozenset({scores})
    cycles_of_a_product = {80: 8 / 2048, 90: 1 / 512}[capability]  # a multiply-add and warp, sass.py's rates
    for kernel, products in (("forward", 2), ("dq", 3), ("dkdv", 4)):
        variant = triton_compile.Variant(kernel, capability, dim, features=features)
        counted = triton_compile.statistics(variant, triton_compile.build(variant))["main_loop"]
        tiles = variant.tiles()
        pairs = tiles.block_m * tiles.block_n * (2 if tiles.paired else 1)
        needed = products * pairs * dim / tiles.num_warps * cycles_of_a_product
        expected = getattr(FIGURES[key][0], kernel)
        assert expected == pytest.approx(counted["instructions"] / needed, abs=0.006), kernel


def test_the_document_has_these_figures():
    assert preference_table.documented() == preference_table.table(), (
        f"run python {preference_table.__file__}"
    )
