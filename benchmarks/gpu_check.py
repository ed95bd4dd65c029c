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
from fastattn.backends.cuda.library import PATH as CUDA_LIBRARY
from fastattn.bench import gpu
from fastattn.build_cuda import find_nvcc
from fastattn.errors import MissingDependencyError

ROOT = Path(__file__).parents[1]
SUITE = ["tests/backends/test_gpu.py", "tests/backends/test_gpu_use.py"]
BENCH = [
    "--shape", "32,12,128,64", "16,12,512,64", "4,16,2048,64", "4,16,2048,128", "1,16,8192,128",
    "--dtype", "float16", "bfloat16",
]  # fmt: skip
PEERS = ["sdpa", "sdpa-flash", "sdpa-cudnn", "flash-attn", "flex"]


def why_not() -> str | None:
    """The reason why there is nothing to check here, or None."""
    return None if torch.cuda.is_available() else "torch sees no CUDA or ROCm device"


def build_cuda() -> None:
    """Compile the CUDA library, some minutes, where there is none yet and nvcc is at hand."""
    if CUDA_LIBRARY.exists():
        return
    try:
        find_nvcc()
    except MissingDependencyError as error:
        print(f"gpu-check: without the cuda backend: {error}")
        return
    _run([sys.executable, "-m", "fastattn", "build-cuda"])


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
    build_cuda()
    backends = available()
    lines = ["# GPU check", "", *(f"- {name}: {value}" for name, value in _where().items())]
    lines += [f"- backend {name}: {reason or 'available'}" for name, reason in backends.items()]
    failed, tests = run_suite(out)
    lines += ["", "## Correctness", "", *tests]
    names = [name for name, reason in backends.items() if not reason]
    if names:  # one process for all of them: only times from interleaved rounds are compared
        command = [sys.executable, "-m", "fastattn", "bench", "--backend", names[0], *BENCH]
        command += ["--against", *names[1:], *PEERS, "--parts", "grid", "features", "--out", out / "bench"]
        status = _run(command)
        failed |= status != 0
        tables = ["It failed."]
        if not status:
            tables = [*bench_tables(out / "bench", names), *features_table(out / "bench", names[0])]
        lines += ["", "## Benchmark", "", *tables]
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


def bench_tables(folder: Path, names: list[str]) -> list[str]:
    """Markdown: fastattn's backends beside each other, then the first of them beside its peers."""
    with (folder / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cells: dict[tuple, dict] = {}
    for row in rows:
        key = ("x".join(row[n] for n in ("batch", "heads", "length", "head_dim")), row["mask"], row["dtype"])
        name = names[0] if row["contender"] == "fastattn" else row["contender"]
        cells.setdefault((*key, row["direction"]), {})[name] = row
    compared = _backends_table(cells, names) if len(names) > 1 else []
    return [*compared, *_peers_table(cells, names[0], [name for name in PEERS if name not in names])]


def features_table(folder: Path, name: str) -> list[str]:
    """Markdown: grouped heads, packed sequences, decoding and dropout beside torch's own attention."""
    table = ["", f"| problem | dtype | feature | pass | {name} ms | sdpa |", "|---|---|---|---|---|---|"]
    with (folder / "features.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            shape = "x".join(row[n] for n in ("batch", "heads", "length", "head_dim"))
            ours, theirs = float(row["fastattn_ms"]), float(row["sdpa_ms"])
            words = (shape, row["dtype"], row["feature"], row["direction"])
            table.append(f"| {' | '.join(words)} | {ours:.3f} | {theirs / ours:.2f} |")
    return table


def _backends_table(cells: dict[tuple, dict], names: list[str]) -> list[str]:
    first, *others = names
    heads = [*(f"{name} ms" for name in names), *(f"{first} / {other}" for other in others), "auto"]
    table = [
        f"Above 1, {first} takes longer. `auto` chooses by a model, which this table can prove wrong.",
        "",
        f"| problem | mask | dtype | pass | {' | '.join(heads)} |",
        f"|{'---|' * (4 + len(heads))}",
    ]
    for key, found in cells.items():
        ours, *theirs = (float(found[name]["milliseconds"] or "nan") for name in names)
        figures = [
            f"{time:.3f}" if time > 0 else found[name]["note"]
            for name, time in zip(names, (ours, *theirs), strict=True)
        ]
        figures += [f"{ours / time:.2f}" if ours / time > 0 else "-" for time in theirs]
        table.append(f"| {' | '.join((*key, *figures, _auto(found[first])))} |")
    return [*table, ""]


def _auto(row: dict) -> str:
    """The backend that a call of this cell gets by itself."""
    shape = [int(row[name]) for name in ("batch", "heads", "length", "head_dim")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, grad = getattr(torch, row["dtype"]), row["direction"] != "forward"
    q = torch.empty(shape, dtype=dtype, device=device, requires_grad=grad)
    mask = torch.ones(shape[0], shape[2], dtype=torch.bool, device=device)
    key_mask = mask if row["mask"] == "padded" else None
    return fastattn.explain(q, q, q, causal=row["mask"] == "causal", key_mask=key_mask).backend or "none"


def _peers_table(cells: dict[tuple, dict], name: str, peers: list[str]) -> list[str]:
    table = [
        f"A peer's figure is its time over {name}'s: above 1, {name} is faster. `-`: see results.csv.",
        "",
        f"| problem | mask | dtype | pass | {name} ms | TFLOP/s | {' | '.join(peers)} |",
        f"|{'---|' * (6 + len(peers))}",
    ]
    for key, found in cells.items():
        ours = found[name]
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
