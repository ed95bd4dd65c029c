"""Faults planted in the PTX of a kernel, one place at a time: each must be noticed, or a pass means nothing.

Launches of the untouched kernel are recorded and repeated with the altered text, on the memory as it was. A
fault is noticed when the simulator stops with an error, when memory differs afterwards, or when the number of
matrix products does: the careful second pass would hide NaN that the first one met.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
import simulated
from oracle import Case, run, upstream_of
from ptxsim import LaunchError, ParseError, PtxError, UnsupportedInstruction
from ptxsim.launch import Layout, Report, _run_grid
from ptxsim.parser import Module, parse


@dataclass(frozen=True)
class Fault:
    """What is looked for in the text, and what it becomes. Of many places, every so manieth is tried."""

    pattern: str
    becomes: str = ""
    every: int = 1


@dataclass(frozen=True)
class Run:
    """A case, inputs whose last row is to be NaN, and how many multiprocessors the device has."""

    case: Case
    spoil: str | None = None
    num_sms: int = 1

    def tensors(self):
        tensors = self.case.tensors()
        if self.spoil is not None:
            tensors[self.spoil][..., -1, :] = float("nan")
        return tensors


@dataclass(frozen=True)
class Kernel:
    """A pattern in a kernel's name, its runs, faults it has no place for, and how often one is missed."""

    name: str
    runs: tuple[Run, ...]
    without: tuple[str, ...] = ()
    missed: dict[str, int] = field(default_factory=dict)

    def hold(self, fault: str, tried: int, missed: list[str]) -> None:
        """Asserts that a fault was noticed where it was planted, but for the places known."""
        assert (tried == 0) == (fault in self.without), tried
        assert len(missed) == self.missed.get(fault, 0), missed


class Launch:
    """One launch of a kernel and what became of it."""

    def __init__(self, kernel, layout, grid, block, memory, options):
        self.name, self.shared, self.parameters = kernel.name, layout.dynamic_size, layout.param_bytes
        self.grid, self.block, self.memory, self.options = grid, block, memory.copy(), options

    def remember(self, module: Module) -> set[int]:
        """Runs the untouched kernel; returns the lines of its text that were executed."""
        self.data, self.products, report = self.repeat(module)
        instrs = report.kernel.instrs
        return {instrs[index].line for index in np.flatnonzero(report.per_instruction)}

    def repeat(self, module: Module) -> tuple[np.ndarray, int, Report]:
        """Memory, the number of matrix products and the report after a run of the module's kernel."""
        kernel, memory = module.kernels[self.name], self.memory.copy()
        layout, report = Layout(module, kernel, self.shared), Report(kernel)
        layout.param_bytes = self.parameters
        with np.errstate(all="ignore"):
            _run_grid(kernel, layout, self.grid, self.block, memory, self.options, report)
        return memory.data, report.count("mma.sync") + report.count("wgmma.mma_async"), report

    def notices(self, module: Module) -> bool:
        try:
            data, products, _ = self.repeat(module)
        except (LaunchError, ParseError, UnsupportedInstruction):
            raise  # the altered text is none that could run
        except PtxError:
            return True
        return products != self.products or not np.array_equal(data, self.data)


@dataclass(frozen=True)
class Recording:
    """The text of a kernel, its launches, and the lines that they executed."""

    text: str
    launches: list[Launch]
    lines: set[int]


def record(device, name: str, runs: tuple[Run, ...], monkeypatch) -> Recording:
    """The one kernel in whose name the pattern `name` is found, in these runs."""
    launches = []

    def recording(kernel, layout, grid, block, memory, options, report):
        if re.search(name, kernel.name):
            launches.append(Launch(kernel, layout, grid, block, memory, options))
        _run_grid(kernel, layout, grid, block, memory, options, report)

    with monkeypatch.context() as patch:
        patch.setattr(simulated, "_run_grid", recording)
        for one in runs:
            tensors = one.tensors()
            device.num_sms = one.num_sms
            run(one.case, tensors, upstream_of(one.case, tensors), backend="cpu")
    (full_name,) = {launch.name for launch in launches}
    text = device.text_of(full_name)
    module = parse(text)
    return Recording(text, launches, set().union(*(launch.remember(module) for launch in launches)))


def plant(recording: Recording, fault: Fault) -> tuple[int, list[str]]:
    """At how many places the fault was planted, and those where no launch noticed it, or went."""
    text, missed = recording.text, []
    places = list(re.finditer(fault.pattern, text))[:: fault.every]
    for place in places:
        first = text.count("\n", 0, place.start()) + 1
        if recording.lines.isdisjoint(range(first, first + place[0].count("\n") + 1)):
            missed.append(f"line {first}, not executed: {place[0]}")
            continue
        altered = text[: place.start()] + place.expand(fault.becomes) + text[place.end() :]
        assert altered != text
        module = parse(altered)
        if not any(launch.notices(module) for launch in recording.launches):
            missed.append(f"line {first}: {place[0]}")
    return len(places), missed
