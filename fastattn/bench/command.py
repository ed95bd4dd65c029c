"""`fastattn bench`."""

from __future__ import annotations

import argparse
import itertools
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastattn.errors import InvalidArgumentError

if TYPE_CHECKING:
    from .grid import Cell
    from .peak import Peak

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="cpu", help="of fastattn: cpu, cuda or triton (cpu)")
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], metavar="T", help="(float32 bfloat16)"
    )
    parser.add_argument(
        "--mask", nargs="+", default=["full", "causal", "padded"], metavar="M", help="(all three)"
    )
    parser.add_argument(
        "--shape", nargs="+", metavar="B,H,N,D", help="problems to time (those of docs/benchmarking.md)"
    )
    parser.add_argument(
        "--longest", type=int, metavar="N", help="leave out longer sequences of what is built in"
    )
    parser.add_argument(
        "--parts", nargs="+", default=["grid"], metavar="P",
        help="grid: against peers; features: grouped heads, packing, decoding and dropout against sdpa; "
        "ratios: what masks, dropout and fewer gradients change; phases: shares of products, softmax, "
        "packing (needs the source tree); scaling: by length, heads, threads (grid)",
    )  # fmt: skip
    parser.add_argument("--forward-only", action="store_true", help="leave the backward pass out")
    parser.add_argument(
        "--against", nargs="*", default=["sdpa", "eager", "flex"], metavar="PEER",
        help="also sdpa-flash, sdpa-cudnn, flash-attn, and other backends by name (sdpa eager flex)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=1.5, metavar="S", help="about how long each cell takes (1.5)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="(torch's own choice)")
    parser.add_argument(
        "--out", default="runs/bench", metavar="DIR", help="for CSV, JSON and plot (runs/bench)"
    )


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    import torch

    import fastattn
    from fastattn.dispatch import load
    from fastattn.finetune.measure import machine, versions

    from . import gpu, peak
    from .contenders import CONTENDERS

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise InvalidArgumentError("--threads", arguments.threads, "a positive number")
        torch.set_num_threads(arguments.threads)
    parts = [_known("--parts", name, _PARTS) for name in arguments.parts]
    peers = [_known("--against", name, CONTENDERS[1:]) for name in arguments.against]
    cells = list(_cells(arguments))
    device = gpu.device_of(arguments.backend)
    for name in parts:
        if name in ("phases", "scaling") and arguments.backend != "cpu":
            raise InvalidArgumentError("--parts", name, "grid, features and ratios, unless --backend is cpu")
    one = torch.zeros(1, 1, 1, 8, device=device)
    # Refuses here, with its reason, or not at all.
    fastattn.attention(one, one, one, backend=arguments.backend)
    on = machine()
    if device == "cuda":
        isa = arguments.backend
        roof, on = gpu.measure_peak(device), on | gpu.machine()
    else:
        isa = load("cpu").isa() if arguments.backend == "cpu" else arguments.backend
        roof = peak.measure(isa, torch.get_num_threads())
    print(_heading(on, roof))
    context = {
        "command": shlex.join(["fastattn", *argv]),
        "machine": on,
        "versions": versions(),
        "peak": vars(roof),
        "timing": "medians of interleaved rounds in one process; speedup = contender's time / fastattn's",
    }
    bench = _Bench(arguments, cells, ["fastattn", *peers], device, isa, roof, Path(arguments.out), context)
    for name in parts:
        print(f"-- {name}")
        _PARTS[name](bench)
    return 0


@dataclass(frozen=True)
class _Bench:
    arguments: argparse.Namespace
    cells: list
    contenders: list[str]
    device: str
    isa: str
    roof: Peak
    folder: Path
    context: dict

    def grid(self) -> None:
        from . import report

        rows: list[dict] = []
        for cell in self.cells:
            measured = self._against_peers(cell)
            rows += measured
            print(report.describe(cell, measured), flush=True)
            report.write(
                self.folder, rows, self.context
            )  # after each cell: an interrupted run keeps what it has
        report.plot(self.folder / "roofline.png", rows, self.cells, self.roof)
        print(f"{self.folder}/results.csv, results.json, roofline.png")

    def _against_peers(self, cell: Cell) -> list[dict]:
        from . import report
        from .contenders import Refusal, make
        from .grid import Inputs
        from .timing import interleaved_medians

        inputs = Inputs(cell, self.device)
        steps, notes = {}, {}
        for name in self.contenders:
            try:
                steps[name] = make(name, inputs, self.arguments.backend)
            except Refusal as refusal:
                notes[name] = str(refusal)
        medians = interleaved_medians(steps, self.arguments.seconds)
        ours = medians.get("fastattn")
        return [
            report.row(cell, name, medians.get(name), ours, self.roof, notes.get(name, ""))
            for name in self.contenders
        ]

    def features(self) -> None:
        from . import features

        rows = itertools.chain.from_iterable(self._problems(features.measure))
        self._table("features.csv", features.FIELDS, rows, features.describe)

    def ratios(self) -> None:
        from . import ratios

        self._table("ratios.csv", ratios.FIELDS, self._problems(ratios.measure), ratios.describe)

    def _problems(self, measure: Callable) -> Iterator:
        """measure(...) of each shape and dtype, whatever its masks and passes."""
        problems = dict.fromkeys((cell.shape, cell.dtype) for cell in self.cells)
        backend, seconds = self.arguments.backend, self.arguments.seconds
        return (measure(*problem, backend, seconds, self.device) for problem in problems)

    def phases(self) -> None:
        from . import phases

        library = phases.build(self.isa)
        rows = (phases.measure(library, cell, self.arguments.seconds) for cell in self.cells)
        self._table("phases.csv", phases.FIELDS, rows, phases.describe)

    def scaling(self) -> None:
        from . import scaling

        longest = self.arguments.longest or scaling.LONGEST
        rows = scaling.measure(longest, self.arguments.seconds)
        scaling.plot(
            self.folder / "scaling.png", self._table("scaling.csv", scaling.FIELDS, rows, scaling.describe)
        )

    def _table(self, name: str, fields: tuple[str, ...], rows: Iterable[dict], describe) -> list[dict]:
        """Prints and writes rows as they come."""
        from . import report

        done: list[dict] = []
        for row in rows:
            done.append(row)
            print(describe(row), flush=True)
            report.write_csv(self.folder / name, fields, done)
        print(self.folder / name)
        return done


_PARTS = {
    "grid": _Bench.grid,
    "features": _Bench.features,
    "ratios": _Bench.ratios,
    "phases": _Bench.phases,
    "scaling": _Bench.scaling,
}


def _cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    from .grid import DTYPES, MASKS, PASSES, SHAPES, Cell

    shapes = [_shape(text) for text in arguments.shape or ()]
    if not shapes:
        shapes = [s for s in SHAPES if arguments.longest is None or s[2] <= arguments.longest]
    dtypes = [_known("--dtype", name, DTYPES) for name in arguments.dtype]
    masks = [_known("--mask", name, MASKS) for name in arguments.mask]
    passes = PASSES[:1] if arguments.forward_only else PASSES
    for shape, mask, direction, dtype in itertools.product(shapes, masks, passes, dtypes):
        yield Cell(*shape, mask, dtype, direction)


def _shape(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if len(numbers) != 4 or not all(n.isdigit() and int(n) > 0 for n in numbers):
        raise InvalidArgumentError("--shape", text, "batch,heads,length,head_dim, such as 8,12,512,64")
    return tuple(map(int, numbers))


def _known(argument: str, name: str, allowed) -> str:
    if name not in allowed:
        raise InvalidArgumentError(argument, name, ", ".join(allowed))
    return name


def _heading(machine: dict, roof) -> str:
    if roof.float32 is None:
        speed = f"peak not measured ({roof.reason})"
    else:
        speed = f"peak {roof.float32 / 1e9:.0f} GF/s fp32, {roof.bfloat16 / 1e9:.0f} GF/s bf16"
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {roof.isa}: {speed}, "
        f"copy {roof.copy_bytes / 1e9:.0f} GB/s.\n"
        "Shares are of that peak; a peer's figure is its time over fastattn's."
    )
