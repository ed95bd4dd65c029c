"""Faults planted in the compiled kernels, one place at a time: each must be noticed, or a pass means nothing.

faults.json has what was planted and how it was noticed, docs/proof-triton.md the totals; both are held here.
If a change is meant, `PYTHONPATH=.:tests python tests/backends/triton/test_faults.py` plants all anew, for an
hour.
"""

import json
import math
import re
from collections import Counter
from pathlib import Path

import fault_kinds
import oracle
import pytest
import torch
from doubles import KERNELS, SimulatedKernel, launch_module, pretend
from ptxsim import In, PtxError, launch_triton, why_no_triton
from simulated_cases import case

pytestmark = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))

TABLE = Path(__file__).with_name("faults.json")
DOCUMENT = Path(__file__).parents[3] / "docs" / "proof-triton.md"
CAUSAL = {"causal": True}
MOST = 3  # places of each kind of fault in a kernel
PROBLEMS = {
    # the problem, long enough for rings of stages to fill; the kernels in which faults are planted
    "causal": (case(lengths=((200, 470),), options=CAUSAL), ("forward", "dq", "dkdv")),
    "wide": (case(lengths=((150, 400),), head_dim=128, options=CAUSAL), ("forward", "dq", "dkdv")),
    "decode": (case(lengths=((1, 1100),), group=4, wanted=()), ("forward", "merge")),
    "bias": (case(bias=(True,) * 4, wanted=("bias",)), ("delta", "dbias")),
    "relative_bias": (case(relative_bias=True, wanted=("relative_bias",)), ("dbias", "join_diagonals")),
    "short": (case(lengths=((130, 300),), options=CAUSAL, wanted=()), ("forward",)),
}
WRITTEN = {
    "forward": ("p_out", "p_lse"), "merge": ("p_out", "p_lse"), "delta": ("p_delta",), "dq": ("p_dq",),
    "dkdv": ("p_dk", "p_dv"), "dbias": ("p_dbias",), "join_diagonals": ("p_drelative",),
}  # fmt: skip
# Their masks choose one of several lanes that hold the same value: without them it is stored twice.
SAME_FROM_ALL_LANES = {("decode", "merge"), ("relative_bias", "dbias")}


# What was seen besides what should have been: between the loop of pairs and the masked one the compiler waits
# for every group, but nothing touches what the last one writes before the next wait for all. (With no wait at
# all there is a race there, and it is reported.)
EXPLAINED = {("wide forward sm_80", "one group too few waited for"): "unnoticed"}


class Kept(SimulatedKernel):
    """Keeps of each run what it takes to run it again: (compiled, grid, arguments)."""

    def run(self, grid, arguments, constexprs, options):
        super().run(grid, arguments, constexprs, options)
        self.runs[-1] = self.runs[-1][1], grid, arguments


def recorded(problem, arch, monkeypatch):
    """The launches of one forward and backward pass, which is held to float64, by the kernel's name."""
    launch, runs = launch_module(), []
    for name in KERNELS:
        monkeypatch.setattr(launch, name, Kept(getattr(launch, name), arch, runs))
    pretend(arch, monkeypatch)
    torch.manual_seed(0)
    oracle.check(PROBLEMS[problem][0], "triton")
    launch.forget()
    return {run[0].metadata.name.removesuffix("_kernel"): run for run in runs}


class Kernel:
    """A compiled kernel with its arguments, and what it writes without a fault."""

    def __init__(self, name, compiled, grid, arguments):
        self.compiled, self.grid = compiled, grid
        self.ptx = compiled.asm["ptx"]
        self.written = [n for n in WRITTEN[name] if arguments[n] is not None]
        # What a fault writes into an input would be read by all that are planted after it.
        self.arguments = {
            n: In(x) if isinstance(x, torch.Tensor) and n not in self.written else x
            for n, x in arguments.items()
        }
        self.right = self.run(self.ptx)

    def run(self, ptx):
        for name in self.written:
            self.arguments[name].fill_(math.nan)
        launch_triton(self.compiled, self.arguments, grid=self.grid, ptx=ptx)
        return [self.arguments[name].detach().clone() for name in self.written]

    def outcome(self, ptx):
        """How it is told that this text is not right; None if it isn't."""
        try:
            results = self.run(ptx)
        except PtxError as error:
            return type(error).__name__
        for x, y in zip(results, self.right, strict=True):
            # NaN stands where nothing was written, and equals nothing.
            if not torch.allclose(
                x, y, rtol=1e-3, atol=1e-3 * float(y.masked_fill(y.isinf(), 0).abs().max())
            ):
                return fault_kinds.RESULTS
        return None


def planted(kernel, most, leave_out=()):
    """By the names of the faults that have a place: how often each outcome was seen ("unnoticed": None).

    Places without effect (see fault_kinds.py) don't count.
    """
    found = {}
    for name, fault in fault_kinds.FAULTS.items():
        outcomes = Counter()
        for place in fault_kinds.places(name, kernel.ptx, most) if name not in leave_out else ():
            outcome = kernel.outcome(fault_kinds.plant(kernel.ptx, place, fault.replacement))
            without_effect = (
                outcome is None
                and fault.probe is not None
                and kernel.outcome(fault_kinds.plant(kernel.ptx, place, fault.probe)) is None
            )
            if not without_effect:
                outcomes[outcome or "unnoticed"] += 1
        if outcomes:
            found[name] = dict(sorted(outcomes.items()))
    return found


def check(outcomes, kernel=""):
    """Each fault was noticed, by what is meant to tell of it."""
    for name, seen in outcomes.items():
        fault = fault_kinds.FAULTS[name]
        allowed = fault.noticed_by | ({"unnoticed"} if fault.spare else set())
        allowed |= {EXPLAINED.get((kernel, name), "")}
        assert seen.keys() <= allowed, (name, seen)


def kernel_of(problem, arch, name, monkeypatch):
    return Kernel(name, *recorded(problem, arch, monkeypatch)[name])


def row(problem, arch, name):
    return f"{problem} {name} sm_{arch}"


def left_out(problem, name):
    return {"store not masked"} if (problem, name) in SAME_FROM_ALL_LANES else set()


PLANTED = [
    (problem, arch, name)
    for problem, (_, names) in PROBLEMS.items()
    if problem != "short"
    for name in names
    for arch in (80, 90)
]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("problem", "arch", "name"), PLANTED)
def test_planted_faults_are_noticed(problem, arch, name, monkeypatch):
    outcomes = planted(kernel_of(problem, arch, name, monkeypatch), MOST, left_out(problem, name))
    check(outcomes, row(problem, arch, name))
    # As the table has it: among them at least one barrier, and one fence, that something needs.
    assert outcomes == json.loads(TABLE.read_text())[row(problem, arch, name)]


@pytest.mark.parametrize("arch", [80, 90])
def test_one_fault_of_each_kind(arch, monkeypatch):
    """In the forward kernel; for the rest there is no time in `make test`."""
    kernel = kernel_of("short", arch, "forward", monkeypatch)
    outcomes = planted(kernel, 1)
    check(outcomes)
    assert len(outcomes) >= (12 if arch == 80 else 15)


@pytest.mark.parametrize(("problem", "name"), [("decode", "merge"), ("relative_bias", "join_diagonals")])
def test_faults_in_small_kernels(problem, name, monkeypatch):
    outcomes = planted(kernel_of(problem, 80, name, monkeypatch), MOST, left_out(problem, name))
    check(outcomes)
    assert outcomes == json.loads(TABLE.read_text())[row(problem, 80, name)]


def test_a_place_without_effect_is_told_from_a_fault_unnoticed():
    """The probe of a copy is one whatever stands before it."""
    text = "@%p5 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd2 + 16 ], 0x10, %r3;"
    fault = fault_kinds.FAULTS["copy left out"]
    (place,) = re.finditer(fault.pattern, text)
    assert fault_kinds.plant(text, place, fault.replacement) == ";"
    assert fault_kinds.plant(text, place, fault.probe) == text.replace("+ 16", f"+ {2**40}")


def test_a_fault_leaves_what_later_ones_read(monkeypatch):
    """Stores that land in an input are told, and the next run finds it as it was."""
    kernel = kernel_of("bias", 80, "delta", monkeypatch)
    passed = [name for name, value in kernel.arguments.items() if value is not None]
    p_out, p_delta = (f"[delta_kernel_param_{passed.index(name)}]" for name in ("p_out", "p_delta"))
    assert kernel.outcome(kernel.ptx.replace(p_delta, p_out)) == fault_kinds.MEMORY
    assert kernel.outcome(kernel.ptx) is None


def test_the_document_has_the_totals():
    table = json.loads(TABLE.read_text())
    assert table.keys() == {row(*which) for which in PLANTED}
    counts, spare, explained = Counter(), 0, 0
    for kernel, outcomes in table.items():
        check(outcomes, kernel)
        for name, seen in outcomes.items():
            counts.update(seen)
            spare += seen.get("unnoticed", 0) * fault_kinds.FAULTS[name].spare
            explained += seen.get("unnoticed", 0) * ((kernel, name) in EXPLAINED)
    missed = counts.pop("unnoticed")
    noticed = counts.total()
    text = " ".join(DOCUMENT.read_text(encoding="utf-8").split())
    assert f"Of {noticed + missed} places in {len(table)} kernels, {noticed} were noticed" in text
    assert f"{spare} of the others are barriers and fences" in text
    assert missed == spare + explained
    assert f"{explained} is a wait" in text


if __name__ == "__main__":
    found = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for problem, arch, name in PLANTED:
        with pytest.MonkeyPatch.context() as patch:
            kernel = kernel_of(problem, arch, name, patch)
        found[row(problem, arch, name)] = planted(kernel, MOST, left_out(problem, name))
        print(row(problem, arch, name), found[row(problem, arch, name)], flush=True)
        TABLE.write_text(json.dumps(found, indent=1) + "\n")
