"""Random attention problems, and the rule by which a backend's results are judged.

A result may be twice as far from the float64 reference as PyTorch's own arithmetic in the same dtype is, plus
a floor of three deviations, which are what rounding alone does to it (rounding.py): 1.7% of a typical element
in bfloat16. PyTorch's own arithmetic is the reference's text computed in that dtype. lse, which is float32 in
every dtype, has the floor alone.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from rounding import deviations, watched
from torch import Tensor

import fastattn
from fastattn import reference

RESULTS = ("out", "lse", "dq", "dk", "dv", "dbias", "drelative_bias")
DIFFERENTIABLE = ("q", "k", "v", "bias", "relative_bias")


@dataclass(frozen=True)
class Case:
    """A problem in numbers; `tensors` draws it."""

    dtype: torch.dtype = torch.float32
    lengths: tuple[tuple[int, int], ...] = ((5, 7), (5, 7))
    """(Nq, Nk) of each sequence; all the same in the padded layout."""
    packed: bool = False
    kv_heads: int = 2
    group: int = 1
    head_dim: int = 16
    head_dim_v: int = 16
    layout: str = "contiguous"
    """contiguous; transposed: a view of (B, N, H, D); sliced out of something; last: not contiguous."""
    mask: float | None = None
    """Share of keys masked out."""
    bias: tuple[bool, bool, bool, bool] | None = None
    """Which axes of (B, Hq, Nq, Nk) the bias has; it broadcasts on the others."""
    relative_bias: bool = False
    alibi: str | None = None
    """"heads" or "batch"."""
    options: dict[str, Any] = field(default_factory=dict)
    """causal, scale, window, softcap, dropout_p, seed."""
    wanted: tuple[str, ...] = ("q", "k", "v")
    use_lse: bool = False
    """Whether a gradient reaches lse."""

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def tensors(self) -> dict[str, Tensor]:
        """q, k, v and whatever else the case has, leaves that ask for no gradient yet."""
        longest_q, longest_k = (max((pair[at] for pair in self.lengths), default=0) for at in (0, 1))
        batch = len(self.lengths)
        drawn = {}
        for name, heads, at, dim in (
            ("q", self.heads, 0, self.head_dim),
            ("k", self.kv_heads, 1, self.head_dim),
            ("v", self.kv_heads, 1, self.head_dim_v),
        ):
            if self.packed:
                shape = (sum(pair[at] for pair in self.lengths), heads, dim)
            else:
                shape = (batch, heads, (longest_q, longest_k)[at], dim)
            drawn[name] = self._laid_out(torch.randn(shape, dtype=torch.float64).to(self.dtype))
        if self.packed:
            for at, name in enumerate(("cu_seqlens_q", "cu_seqlens_k")):
                steps = torch.tensor([0, *(pair[at] for pair in self.lengths)])
                drawn[name] = steps.cumsum(0).to(torch.int32)
        if self.mask is not None:
            drawn["key_mask"] = torch.rand(batch, longest_k) >= self.mask
        if self.bias is not None:
            full = (batch, self.heads, longest_q, longest_k)
            drawn["bias"] = torch.randn(
                [size if has else 1 for size, has in zip(full, self.bias, strict=True)]
            )
            drawn["bias"] = drawn["bias"].to(self.dtype)
        if self.relative_bias:
            drawn["relative_bias"] = torch.randn(self.heads, max(longest_q + longest_k - 1, 0))
        if self.alibi is not None:
            drawn["alibi_slopes"] = torch.rand(
                (self.heads,) if self.alibi == "heads" else (batch, self.heads)
            )
        return drawn

    def _laid_out(self, x: Tensor) -> Tensor:
        heads, rows = (1, 0) if self.packed else (1, 2)
        if self.layout == "transposed":
            return x.transpose(heads, rows).contiguous().transpose(heads, rows)
        if self.layout == "sliced":
            padded = torch.full([size + 3 for size in x.shape], float("nan"), dtype=x.dtype)
            view = padded[tuple(slice(1, 1 + size) for size in x.shape)]
            view.copy_(x)
            return view
        if self.layout == "last":
            return x.transpose(-1, -2).contiguous().transpose(-1, -2)
        return x


def run(
    case: Case,
    tensors: dict[str, Tensor],
    upstream: dict[str, Tensor],
    *,
    backend: str,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """out, lse and the gradients wanted; inputs as they are, or converted to `dtype`.

    compute_dtype: what the reference computes in.
    """
    inputs = {
        name: x.to(dtype) if dtype is not None and x.is_floating_point() else x.detach()
        for name, x in tensors.items()
    }
    leaves = [inputs[name].requires_grad_() for name in DIFFERENTIABLE if name in case.wanted]
    function = fastattn.varlen_attention if case.packed else fastattn.attention
    with computing_in(compute_dtype):
        out, lse = function(**inputs, **case.options, return_lse=True, backend=backend)
    results = {"out": out.detach(), "lse": lse.detach()}
    if leaves:
        outputs = [(out, upstream["out"])] + [(lse, upstream["lse"])] * case.use_lse
        # v has no part in lse, and nothing a part in what no key reaches.
        outputs = [(x, gradient.to(x.dtype)) for x, gradient in outputs if x.requires_grad]
        reached, upstreams = zip(*outputs, strict=True)
        gradients = torch.autograd.grad(reached, leaves, upstreams, materialize_grads=True)
        names = [f"d{name}" for name in DIFFERENTIABLE if name in case.wanted]
        results.update(zip(names, gradients, strict=True))
    return results


@contextlib.contextmanager
def computing_in(dtype: torch.dtype | None):
    """Make backend="reference" compute in `dtype`."""
    if dtype is None:
        yield
        return
    original = reference.attention
    reference.attention = lambda problem, inputs: original(problem, inputs, dtype)
    try:
        yield
    finally:
        reference.attention = original


def upstream_of(case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random gradients of out and lse; zero for the lse of rows that see nothing."""
    exact = run(replace(case, wanted=()), tensors, {}, backend="reference", dtype=torch.float64)
    of_lse = torch.randn(exact["lse"].shape, dtype=torch.float32).double()
    return {
        "out": torch.randn(exact["out"].shape, dtype=torch.float64).to(case.dtype),
        "lse": of_lse.masked_fill(exact["lse"].isinf(), 0.0),
    }


def check(
    case: Case, backend: str = "cpu", floor: float = 3.0, given_as: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Hold every result of `backend` to the rule; returns the results, for more to be asked of them.

    given_as: a wider dtype that `backend` gets the case's tensors in, and still is held to the case's own.
    """
    tensors = case.tensors()
    expected = Expected(case, tensors)
    ours = run(case, tensors, expected.upstream, backend=backend, dtype=given_as)
    expected.judge(ours, floor)
    return ours


class Expected:
    """What a case's results should be, and how far from it they may lie."""

    def __init__(self, case: Case, tensors: dict[str, Tensor]):
        self.upstream = upstream_of(case, tensors)
        with watched() as seen:
            self.exact = run(case, tensors, self.upstream, backend="reference", dtype=torch.float64)
        self.plain = run(case, tensors, self.upstream, backend="reference", compute_dtype=case.dtype)
        self.deviations = deviations(case, tensors, self.upstream, self.exact, seen)

    def judge(self, results: dict[str, Tensor], floor: float = 3.0) -> None:
        """Every element may err by twice the largest error of PyTorch's in the same row, plus the floor; a
        whole tensor by as much in root mean squares, whose floor is one deviation.

        floor: in deviations; they count roundings at their largest, so that 3 are 5 of what really occurs.
        """
        assert results.keys() == self.exact.keys()
        for name, result in results.items():
            exact, deviation = self.exact[name], self.deviations[name]
            assert result.shape == exact.shape, name
            finite = exact.isfinite()
            assert torch.equal(result.double()[~finite], exact[~finite]), f"{name}: infinities differ"
            error, of_plain = (
                (x.double() - exact).masked_fill(~finite, 0.0).abs() for x in (result, self.plain[name])
            )
            if (
                name == "lse"
            ):  # no result of a kernel is narrower than this one, which is float32 in every dtype
                of_plain = torch.zeros_like(of_plain)
            if not error.numel():
                continue
            allowed = 2.0 * of_plain.amax(-1, keepdim=True) + floor * deviation
            excess = (error - allowed).argmax()
            assert (error <= allowed).all(), (
                f"{name}: error {error.flatten()[excess]:.3g} > {allowed.flatten()[excess]:.3g} allowed, "
                f"at {[int(i) for i in torch.unravel_index(excess, error.shape)]}"
            )
            error, allowed = _rms(error), 2.0 * _rms(of_plain) + _rms(deviation)
            assert error <= allowed, f"{name}: root mean square of errors {error:.3g} > {allowed:.3g} allowed"


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


# ---- cases for hypothesis

# Long enough for more than one key tile of every backend, so drawn with few heads, and seldom.
_many_keys = st.sampled_from([257, 300, 513, 700])
_dims = st.sampled_from([1, 3, 8, 16, 17, 32, 40, 64, 65, 80, 96, 100, 128, 129, 200, 255, 256])
_sizes = st.one_of(
    st.integers(1, 20), st.integers(1, 90), st.sampled_from([0, 1, 16, 31, 32, 33, 64, 127, 128, 129, 130])
)


@st.composite
def cases(draw, dtypes=(torch.float32, torch.bfloat16, torch.float16)) -> Case:
    """Any combination of features, in shapes that cross tile borders."""
    packed = draw(st.booleans())
    if packed:
        lengths = tuple(draw(st.lists(st.tuples(_sizes, _sizes), min_size=1, max_size=4)))
    else:
        lengths = ((draw(_sizes), draw(_sizes)),) * draw(st.integers(1, 3))
    long = draw(st.integers(0, 4)) == 0
    if long:
        one = (draw(_sizes), draw(_many_keys))
        lengths = (*lengths[:1], one) if packed else (one,)
    head_dim = draw(_dims)
    options = {}
    if draw(st.booleans()):
        options["causal"] = True
    if draw(st.integers(0, 3)) == 0:
        side = st.one_of(st.none(), st.integers(0, 40))
        options["window"] = (draw(side), draw(side))
    if draw(st.integers(0, 3)) == 0:
        options["softcap"] = draw(st.sampled_from([1.0, 5.0, 30.0]))
    if draw(st.integers(0, 3)) == 0:
        options["scale"] = draw(st.sampled_from([0.0, 0.05, -0.2, 1.0]))
    if draw(st.integers(0, 2)) == 0:
        options["dropout_p"] = draw(st.sampled_from([0.1, 0.5, 0.9]))
        options["seed"] = draw(st.integers(0, 2**64 - 1))
    bias = draw(st.one_of(st.none(), st.tuples(*[st.booleans()] * 4)))
    relative_bias = draw(st.integers(0, 3)) == 0
    possible = ["q", "k", "v"] + ["bias"] * (bias is not None) + ["relative_bias"] * relative_bias
    wanted = draw(st.one_of(st.just(possible), st.lists(st.sampled_from(possible), unique=True)))
    return Case(
        dtype=draw(st.sampled_from(dtypes)),
        lengths=lengths,
        packed=packed,
        kv_heads=1 if long else draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 1, 2, 3])),
        head_dim=head_dim,
        head_dim_v=draw(st.one_of(st.just(head_dim), _dims)),
        layout=draw(st.sampled_from(["contiguous", "transposed", "sliced", "last"])),
        mask=None if packed else draw(st.sampled_from([None, None, 0.2, 0.8, 1.0])),
        bias=bias,
        relative_bias=relative_bias,
        alibi=draw(st.sampled_from([None, None, "heads", "batch"])),
        options=options,
        wanted=tuple(wanted),
        use_lse=draw(st.booleans()),
    )
