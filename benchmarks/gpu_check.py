"""`make gpu-check`: on a machine with a GPU, its backends' correctness suite and benchmark, and a report.

Writes report.md, the suite's junit.xml and the bench's tables and plots into a folder. Ends with 1 if a test
or a bench failed. Without a GPU it says so, writes nothing and ends with 0.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

import fastattn
from fastattn.bench import gpu

ROOT = Path(__file__).parents[1]
SUITE = ["tests/backends/test_gpu.py"]
BENCH = [
    "--shape", "32,12,128,64", "16,12,512,64", "4,16,2048,64", "4,16,2048,128", "1,16,8192,128",
    "--dtype", "float16", "bfloat16", "--against", "sdpa", "sdpa-flash", "sdpa-cudnn", "flash-attn", "flex",
]  # fmt: skip


def why_not() -> str | None:
    """The reason why there is nothing to check here, or None."""
    return None if torch.cuda.is_available() else "torch sees no CUDA or ROCm device"


def available() -> dict[str, str]:
    """The backends for GPUs: "" where one can run, else the reason why not."""
    return {s.name: s.reason for s in fastattn.backends() if s.name in ("triton", "cuda")}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check", help="(runs/gpu-check)")
    out = parser.parse_args(argv).out
    reason = why_not()
    if reason is not None:
        print(f"gpu-check: SKIPPED, nothing was checked: {reason}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    backends = available()
    lines = ["# GPU check", "", *(f"- {name}: {value}" for name, value in _where().items())]
    lines += [f"- backend {name}: {reason or 'available'}" for name, reason in backends.items()]
    failed, tests = run_suite(out)
    lines += ["", "## Correctness", "", *tests]
    for name in (name for name, reason in backends.items() if not reason):
        folder = out / f"bench-{name}"
        status = _run(
            [sys.executable, "-m", "fastattn.cli", "bench", "--backend", name, *BENCH, "--out", folder]
        )
        failed |= status != 0
        lines += ["", f"## Benchmark of {name}", "", *(bench_table(folder) if not status else ["It failed."])]
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{out / 'report.md'}: {'FAILED' if failed else 'passed'}")
    return int(failed)


def _where() -> dict:
    on = gpu.machine() if torch.cuda.is_available() else {}
    return {"fastattn": fastattn.__version__, "torch": torch.__version__} | on


def run_suite(out: Path) -> tuple[bool, list[str]]:
    """(whether it failed, what the report says of it)."""
    junit = out / "junit.xml"
    junit.unlink(missing_ok=True)
    status = _run([sys.executable, "-m", "pytest", "-q", f"--junitxml={junit}", *SUITE])
    if not junit.exists():
        return True, [f"pytest ended with {status} and wrote nothing."]
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    details = []
    for test in ElementTree.parse(junit).iter("testcase"):
        name = f"{test.get('classname')}::{test.get('name')}"
        failure = next(
            (test.find(kind) for kind in ("failure", "error") if test.find(kind) is not None), None
        )
        skip = test.find("skipped")
        counts["failed" if failure is not None else "skipped" if skip is not None else "passed"] += 1
        if failure is not None:
            details.append(f"- FAILED {name}: {(failure.get('message') or '').splitlines()[:1]}")
        elif skip is not None:
            details.append(f"- skipped {name}: {skip.get('message')}")
    head = ", ".join(f"{count} {word}" for word, count in counts.items())
    return status != 0, [f"{head} ({' '.join(SUITE)})", "", *details]


def bench_table(folder: Path) -> list[str]:
    """Markdown: a line a cell, fastattn's milliseconds and TFLOP/s, every peer's time over fastattn's."""
    with (folder / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    peers = [name for name in dict.fromkeys(row["contender"] for row in rows) if name != "fastattn"]
    cells: dict[tuple, dict] = {}
    for row in rows:
        key = ("x".join(row[n] for n in ("batch", "heads", "length", "head_dim")), row["mask"], row["dtype"])
        cells.setdefault((*key, row["direction"]), {})[row["contender"]] = row
    table = [
        "A peer's figure is its time over fastattn's: above 1, fastattn is faster. `-`: see results.csv.",
        "",
        f"| problem | mask | dtype | pass | fastattn ms | TFLOP/s | {' | '.join(peers)} |",
        f"|{'---|' * (6 + len(peers))}",
    ]
    for key, found in cells.items():
        ours = found["fastattn"]
        if not ours["milliseconds"]:
            table.append(f"| {' | '.join(key)} | {ours['note']} |")
            continue
        figures = [f"{float(ours['milliseconds']):.3f}", f"{float(ours['gflops']) / 1e3:.1f}"]
        figures += [f"{float(found[p]['speedup']):.2f}" if found[p]["speedup"] else "-" for p in peers]
        table.append(f"| {' | '.join((*key, *figures))} |")
    return table


def _run(command: list) -> int:
    print("$", *command, flush=True)
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
