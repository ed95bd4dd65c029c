"""Where the CPU kernels' time goes: shares of products, softmax and packing, counted by a build of their own.

Needs the source tree: the library that is installed counts nothing.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastattn.backends import Gradients
from fastattn.backends.cpu.backend import CpuBackend
from fastattn.errors import UnsupportedError
from fastattn.problem import AttentionInputs
from fastattn.problem import describe as describe_problem

from .grid import Cell, Inputs

__all__ = ["FIELDS", "PHASES", "build", "describe", "measure"]

# Those of csrc/cpu/phases.h, in its order; the last is the whole.
PHASES = ("packing", "q k^T", "row pass", "p v", "dout v^T", "dk, dv", "dq", "all")
FIELDS = ("batch", "heads", "length", "head_dim", "mask", "dtype", "direction", *PHASES[:-1], "rest")
_SOURCES = Path(__file__).parents[2] / "csrc"


def build(isa: str) -> Path:
    """The counting library for one instruction set, in build/phases of the source tree; UnsupportedError."""
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if not _SOURCES.is_dir() or cmake is None or ninja is None:
        missing = "its sources" if not _SOURCES.is_dir() else "cmake and ninja on PATH"
        raise UnsupportedError("phases are counted by a library built for it", {"cpu": f"needs {missing}"})
    tree = _SOURCES.parent / "build" / "phases"
    configure = [
        cmake, "-S", _SOURCES, "-B", tree, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
        "-DFASTATTN_PHASES=ON", f"-DFASTATTN_ISAS={isa}", f"-DFASTATTN_OUTPUT_DIR={tree}",
    ]  # fmt: skip
    for command in (configure, [cmake, "--build", tree, "--target", "fastattn_cpu"]):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr or done.stdout).strip()[-300:]
            raise UnsupportedError("phases are counted by a library built for it", {"cpu": reason})
    return next(tree.glob("libfastattn_cpu.*"))


def measure(library: Path, cell: Cell, seconds: float) -> dict:
    """A row of FIELDS: each phase's share of one thread's time, in forward or in backward alone."""
    backend = CpuBackend(library)
    if reason := backend.status():
        raise UnsupportedError("the counting library does not load", {"cpu": reason})
    take = ctypes.CDLL(str(library)).fastattn_cpu_take_phases
    ticks = (ctypes.c_uint64 * len(PHASES))()
    runs: list[list[int]] = []
    step = _step(backend, cell)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        step()  # warm-up
        take(ticks)
        end = time.perf_counter() + seconds
        while len(runs) < 3 or time.perf_counter() < end:
            step()
            take(ticks)
            runs.append(list(ticks))
    finally:
        torch.set_num_threads(before)
    # Ticks go on while another process has the processor, so the slower half of the runs is left out.
    runs.sort(key=lambda run: run[-1])
    *parts, whole = map(sum, zip(*runs[: (len(runs) + 1) // 2], strict=True))
    shares = {name: part / whole for name, part in zip(PHASES, parts, strict=False)}
    direction = "backward" if cell.direction == "forward+backward" else cell.direction
    row = dict(zip(FIELDS, (*cell.shape, cell.mask, cell.dtype, direction), strict=False))
    return row | shares | {"rest": 1.0 - sum(shares.values())}


def _step(backend: CpuBackend, cell: Cell) -> Callable[[], None]:
    drawn = Inputs(cell)
    q, k, v = (x.detach() for x in (drawn.q, drawn.k, drawn.v))
    inputs = AttentionInputs(q, k, v, drawn.key_mask)
    options = (cell.mask == "causal", cell.head_dim**-0.5, -1, -1, 0.0, 0.0, 0, 0)
    problem = describe_problem(inputs, options, drawn.with_backward)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    if not drawn.with_backward:
        return lambda: backend.forward(problem, inputs, out, lse)
    backend.forward(problem, inputs, out, lse)
    gradients = Gradients(*(torch.empty_like(x) for x in (q, k, v)))
    return lambda: backend.backward(problem, inputs, out, lse, drawn.dout, None, gradients)


def describe(row: dict) -> str:
    """A row as one line of text."""
    shape = "x".join(str(row[name]) for name in FIELDS[:4])
    parts = ", ".join(f"{name} {row[name]:.0%}" for name in FIELDS[7:] if row[name] >= 0.005)
    return f"{shape:<14} {row['mask']:<7} {row['dtype']:<9} {row['direction']:<9} {parts}"
