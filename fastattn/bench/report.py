"""The results as CSV, JSON, a table on the terminal and a roofline plot."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path

from .grid import Cell
from .peak import Peak

__all__ = ["FIELDS", "describe", "plot", "row", "write", "write_csv"]

FIELDS = (
    "batch", "heads", "length", "head_dim", "mask", "dtype", "direction", "contender",
    "milliseconds", "gflops", "share_of_peak", "speedup", "note",
)  # fmt: skip


def row(
    cell: Cell, contender: str, seconds: float | None, ours: float | None, peak: Peak, note: str = ""
) -> dict:
    """One line of the CSV. speedup: this contender's time over fastattn's."""
    roof = peak.flops(cell.dtype)
    return {
        "batch": cell.batch,
        "heads": cell.heads,
        "length": cell.length,
        "head_dim": cell.head_dim,
        "mask": cell.mask,
        "dtype": cell.dtype,
        "direction": cell.direction,
        "contender": contender,
        "milliseconds": seconds and seconds * 1e3,
        "gflops": seconds and cell.flops / seconds / 1e9,
        "share_of_peak": seconds and roof and cell.flops / seconds / roof,
        "speedup": seconds and ours and seconds / ours,
        "note": note,
    }


def describe(cell: Cell, rows: list[dict]) -> str:
    """A cell in one line of text."""
    shape = "x".join(map(str, cell.shape))
    parts = []
    for r in rows:
        if r["milliseconds"] is None:
            parts.append(f"{r['contender']} -")
        elif r["contender"] == "fastattn":
            share = f" ({r['share_of_peak']:.0%} of peak)" if r["share_of_peak"] else ""
            parts.append(f"fastattn {r['milliseconds']:.2f} ms, {r['gflops']:.0f} GF/s{share}")
        else:
            parts.append(f"{r['contender']} {r['speedup']:.2f}x" if r["speedup"] else f"{r['contender']} ?")
    return f"{shape:<14} {cell.mask:<7} {cell.dtype:<9} {cell.direction:<17} " + "; ".join(parts)


def write(folder: Path, rows: list[dict], context: dict) -> list[Path]:
    """results.csv and results.json; the latter with machine, versions, peak and command."""
    write_csv(folder / "results.csv", FIELDS, rows)
    (folder / "results.json").write_text(json.dumps({**context, "rows": rows}, indent=1), encoding="utf-8")
    return [folder / "results.csv", folder / "results.json"]


def write_csv(path: Path, fields: Iterable[str], rows: Iterable[dict]) -> None:
    """Rows under a line of their names; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(fields))
        writer.writeheader()
        writer.writerows(rows)


def plot(path: Path, rows: list[dict], cells: list[Cell], peak: Peak) -> None:
    """Speed over arithmetic intensity, under the roof that memory and multiply-adds set."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = sorted({(cell.dtype, cell.direction) for cell in cells}, reverse=True)
    columns = min(2, len(kinds))
    lines = -(-len(kinds) // columns)
    figure = Figure(figsize=(6 * columns, 4.5 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    intensity = {
        (*cell.shape, cell.mask, cell.dtype, cell.direction): cell.flops / cell.bytes for cell in cells
    }
    for index, (dtype, direction) in enumerate(kinds):
        axes = figure.add_subplot(lines, columns, index + 1)
        found = [r for r in rows if (r["dtype"], r["direction"]) == (dtype, direction) and r["gflops"]]
        positions = [intensity[tuple(r[name] for name in FIELDS[:7])] for r in found]
        if not found:
            continue
        left, right = min(positions) / 2, max(positions) * 2
        xs = [left * (right / left) ** (step / 100) for step in range(101)]
        roof = peak.flops(dtype) or float("inf")
        axes.plot(
            xs, [min(roof, x * peak.copy_bytes) / 1e9 for x in xs], color="black", label="roof (measured)"
        )
        for marker, name in zip("o^svDP*X", dict.fromkeys(r["contender"] for r in found), strict=False):
            points = [
                (x, r["gflops"]) for x, r in zip(positions, found, strict=True) if r["contender"] == name
            ]
            axes.scatter(*zip(*points, strict=True), marker=marker, s=28, label=name, alpha=0.8)
        axes.set(xscale="log", yscale="log", title=f"{dtype}, {direction}")
        axes.set(xlabel="FLOP per byte of inputs and outputs", ylabel="GFLOP/s of visible pairs")
        axes.grid(True, which="both", alpha=0.2)
        axes.legend()
    figure.savefig(path, dpi=120)
