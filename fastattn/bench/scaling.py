"""How time grows with sequence length, batch times heads and threads; and what memory a call needs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

import fastattn
from fastattn.finetune.measure import peak_rss, reset_peak_rss, rss

from .ratios import DROPOUT_P
from .timing import interleaved_medians

__all__ = ["FIELDS", "LONGEST", "describe", "measure", "plot"]

FIELDS = ("axis", "batch", "heads", "length", "head_dim", "threads", "variant", "milliseconds", "extra_bytes")
LONGEST = 32768
HEAD_DIM = 64
VARIANTS = {"full": {}, "causal": {"causal": True}, "dropout": {"dropout_p": DROPOUT_P, "seed": 0}}


def measure(longest: int, seconds: float) -> Iterator[dict]:
    """Rows of FIELDS. Times are of forward without gradients, on the CPU in float32."""
    threads = torch.get_num_threads()
    length = 128
    while length <= longest:
        yield from _lengths(length, threads, seconds)
        length *= 2
    for heads in (1, 2, 4, 8, 16, 32, 64):
        yield from _timed("batch x heads", (1, heads, 512), [threads], ["full"], seconds)
    counts = sorted({1, *(2**n for n in range(1, 12) if 2**n < (os.cpu_count() or 1)), threads})
    yield from _timed("threads", (1, 16, 1024), counts, ["full"], seconds)


def _lengths(length: int, threads: int, seconds: float) -> Iterator[dict]:
    for row in _timed("length", (1, 2, length), [threads], VARIANTS, seconds):
        if row["variant"] == "full" and (extra := extra_bytes(length)) is not None:
            row["extra_bytes"] = extra
        yield row


def _timed(
    axis: str, shape: tuple[int, int, int], counts: Iterable[int], variants: Iterable[str], seconds: float
) -> Iterator[dict]:
    """One interleaved run over thread counts and variants."""
    q, k, v = (torch.randn(*shape, HEAD_DIM) for _ in range(3))
    before = torch.get_num_threads()

    def step(count: int, variant: str) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(count)
            with torch.no_grad():
                fastattn.attention(q, k, v, **VARIANTS[variant], backend="cpu")

        return run

    steps = {(count, variant): step(count, variant) for count in counts for variant in variants}
    try:
        medians = interleaved_medians(steps, seconds)
    finally:
        torch.set_num_threads(before)
    for (count, variant), time in medians.items():
        batch, heads, length = shape
        yield dict(zip(
            FIELDS, (axis, batch, heads, length, HEAD_DIM, count, variant, time * 1e3, None), strict=True
        ))  # fmt: skip


def extra_bytes(length: int, heads: int = 1, dtype: torch.dtype = torch.float32) -> int | None:
    """What one thread needs beyond inputs and results in forward and backward; None where nobody can tell."""
    found: list[int] = []

    def run(rows: int) -> None:
        torch.set_num_threads(1)
        q, k, v, dout = (torch.randn(1, heads, rows, HEAD_DIM).to(dtype) for _ in range(4))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        reset_peak_rss()
        before = rss()
        if before is None or peak_rss() > before + 2**20:  # the peak could not be reset
            return
        out = fastattn.attention(q, k, v, causal=True, backend="cpu")
        results = (out, *torch.autograd.grad(out, leaves, dout))
        lse_bytes = 4 * heads * rows
        found.append(peak_rss() - before - lse_bytes - sum(x.nbytes for x in results))

    threads = torch.get_num_threads()
    try:
        for rows in (256, length):  # the first loads what every call needs
            found.clear()
            thread = threading.Thread(target=run, args=(rows,))  # its workspace begins and ends with it
            thread.start()
            thread.join()
    finally:
        torch.set_num_threads(threads)
    return found[0] if found else None


def describe(row: dict) -> str:
    """A row as one line of text."""
    at = {"length": "length", "batch x heads": "heads", "threads": "threads"}[row["axis"]]
    extra = "" if row["extra_bytes"] is None else f", {row['extra_bytes'] / 2**20:.2f} MiB beyond results"
    return f"{row['axis']} {row[at]:<6} {row['variant']:<8} {row['milliseconds']:.3f} ms{extra}"


def plot(path: Path, rows: list[dict]) -> None:
    """scaling.png: four curves, each beside the straight line that it should follow."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    FigureCanvasAgg(figure)
    by_length, memory, by_heads, by_threads = figure.subplots(2, 2).flat

    def points(axis: str, x: str, variant: str, y: str = "milliseconds") -> list[tuple[float, float]]:
        chosen = [r for r in rows if r["axis"] == axis and r["variant"] == variant and r[y] is not None]
        return [(r[x], r[y]) for r in chosen]

    def draw(axes, found: list[tuple[float, float]], label: str, power: float | None = None) -> None:
        if not found:
            return
        xs, ys = zip(*found, strict=True)
        (line,) = axes.plot(xs, ys, marker="o", label=label)
        if power is not None:
            ideal = [ys[-1] * (x / xs[-1]) ** power for x in xs]
            axes.plot(xs, ideal, "--", color=line.get_color(), alpha=0.5, label=f"x^{power:g}")

    for variant in VARIANTS:
        draw(by_length, points("length", "length", variant), variant, 2 if variant == "full" else None)
    draw(by_heads, points("batch x heads", "heads", "full"), "full", 1)
    draw(by_threads, points("threads", "threads", "full"), "full", -1)
    mebibytes = [(x, y / 2**20) for x, y in points("length", "length", "full", "extra_bytes")]
    draw(memory, mebibytes, "forward + backward, one thread")
    by_length.set(xscale="log", yscale="log", xlabel="sequence length", ylabel="ms, forward")
    by_heads.set(xscale="log", yscale="log", xlabel="batch x heads (512 rows)", ylabel="ms, forward")
    by_threads.set(xlabel="threads (16 heads of 1024 rows)", ylabel="ms, forward", ylim=(0, None))
    memory.set(xscale="log", xlabel="sequence length", ylabel="MiB beyond inputs and results", ylim=(0, None))
    for axes in (by_length, memory, by_heads, by_threads):
        axes.grid(True, which="both", alpha=0.2)
        axes.legend()
    figure.savefig(path, dpi=120)
