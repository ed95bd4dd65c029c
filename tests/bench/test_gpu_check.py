"""What `make gpu-check` and the bench do for GPUs, as far as a machine without one can run it."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastattn.bench import contenders, gpu
from fastattn.bench.grid import Cell, Inputs

ROOT = Path(__file__).parents[2]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@pytest.fixture
def check():
    """The module benchmarks/gpu_check.py."""
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@no_gpu
def test_without_a_gpu_it_says_that_nothing_was_checked(check, tmp_path, capsys):
    assert check.main(["--out", str(tmp_path / "report")]) == 0
    assert "SKIPPED, nothing was checked: torch sees no" in capsys.readouterr().out
    assert not (tmp_path / "report").exists()


@pytest.fixture
def pretend(check, tmp_path, monkeypatch):
    """The reference and the CPU stand for the GPU's backends, a small file for the suite."""
    monkeypatch.setattr(check, "why_not", lambda: None)
    monkeypatch.setattr(check, "build_cuda", lambda: None)
    bench = ["--shape", "1,1,20,16", "--mask", "full", "padded", "--dtype", "float32", "--seconds", "0"]
    monkeypatch.setattr(check, "BENCH", bench)
    monkeypatch.setattr(check, "PEERS", ["sdpa", "sdpa-cudnn", "flash-attn"])

    def suite(text, backends):
        monkeypatch.setattr(check, "available", lambda: backends)
        file = tmp_path / "test_pretended.py"
        file.write_text(f"import pytest\n{text}")
        monkeypatch.setattr(check, "SUITE", [str(file), "-p", "no:cacheprovider", "-c", os.devnull])
        return tmp_path / "report"

    return suite


def test_report(check, pretend, cpu):
    """Of two backends, of which one refuses, and of one that is not there."""
    suite = "def test_good(): pass\ndef test_absent(): pytest.skip('no such part')\n"
    out = pretend(suite, {"reference": "", "cpu": "", "cuda": "", "triton": "not built"})
    assert check.main(["--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "1 passed, 0 failed, 1 skipped" in text
    assert "test_absent: no such part" in text
    assert "backend triton: not built" in text

    head = "| reference ms | cpu ms | cuda ms | reference / cpu | reference / cuda | auto |"
    compared, peers = (part.split("\n\n")[0] for part in text.split("| problem | mask | dtype | pass ")[1:])
    assert compared.startswith(head)
    for line in (lines := compared.splitlines()[2:]):
        reference, ours, cuda, ratio, none, auto = map(str.strip, line.split("|")[5:11])
        assert float(ratio) == pytest.approx(float(reference) / float(ours), rel=0.05)
        assert "backend 'cuda'" in cuda or "on cpu" in cuda, "why it has no time"
        assert (none, auto) == ("-", "cpu"), "what auto takes for tensors on the CPU"
    assert len(lines) == 4  # two masks, two passes
    assert peers.startswith("| reference ms | TFLOP/s | sdpa | sdpa-cudnn | flash-attn |")
    # Of two decimals: nothing is left of 0.004 on a machine that was disturbed.
    assert all(float(line.split("|")[7]) >= 0 for line in peers.splitlines()[2:])

    features = text.split("| problem | dtype | feature | pass | reference ms | sdpa |\n")[1].splitlines()[1:]
    assert [line.split("|")[3].strip() for line in features] == [
        *["grouped"] * 2,
        *["packed"] * 2,
        "decode",
        *["dropout"] * 2,
    ]
    assert all(float(line.split("|")[5]) > 0 for line in features)

    rows = json.loads((out / "bench" / "results.json").read_text())["rows"]
    notes = {row["contender"]: row["note"] for row in rows if row["mask"] == "full"}
    assert notes["flash-attn"] == "flash-attn is not installed" or importlib.util.find_spec("flash_attn")
    if not torch.cuda.is_available():
        assert notes["sdpa-cudnn"]


def test_one_backend_is_compared_with_its_peers_alone(check, tmp_path):
    row = dict.fromkeys(("batch", "heads", "length", "head_dim"), 1) | {
        "mask": "full", "dtype": "float32", "direction": "forward", "contender": "fastattn",
        "milliseconds": 2, "gflops": 3000, "speedup": 1, "note": "",
    }  # fmt: skip
    peers = [row | {"contender": name, "speedup": 1.5} for name in check.PEERS]
    with (tmp_path / "results.csv").open("w") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows([row, *peers])
    lines = check.bench_tables(tmp_path, ["cuda"])
    assert lines[-1] == f"| 1x1x1x1 | full | float32 | forward | 2.000 | 3.0 |{' 1.50 |' * len(peers)}"
    assert not any("auto" in line for line in lines)


def test_cuda_is_built_where_it_can_be(check, tmp_path, monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(check, "_run", commands.append)
    monkeypatch.setattr(check, "CUDA_LIBRARY", tmp_path / "library")
    monkeypatch.setattr(check, "find_nvcc", lambda: Path("nvcc"))
    check.build_cuda()
    assert commands == [[sys.executable, "-m", "fastattn", "build-cuda"]]

    def absent():
        raise check.MissingDependencyError("nvcc", "cuda-build")

    monkeypatch.setattr(check, "find_nvcc", absent)
    check.build_cuda()
    assert "without the cuda backend" in capsys.readouterr().out
    (tmp_path / "library").touch()
    check.build_cuda()
    assert len(commands) == 1


def test_a_failure_is_the_exit_code(check, pretend):
    out = pretend("def test_bad(): assert 1 == 2\n", {"reference": ""})
    check.BENCH[:] = ["--shape", "none"]
    assert check.main(["--out", str(out)]) == 1
    text = (out / "report.md").read_text()
    assert "0 passed, 1 failed" in text
    assert "It failed." in text


def test_peak_is_measured():
    peak = gpu.measure_peak("cuda" if torch.cuda.is_available() else "cpu", size=64, seconds=0.0)
    assert min(peak.float32, peak.bfloat16, peak.float16, peak.copy_bytes) > 0
    assert peak.flops("float16") == peak.float16


def test_torch_by_one_of_its_kernels_computes_the_same():
    inputs = Inputs(Cell(1, 2, 20, 16, "causal", "float32", "forward"))
    torch.testing.assert_close(gpu.sdpa_by(gpu.SDPBackend.MATH, inputs)(), contenders._sdpa(inputs)())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_bench_of_triton_interpreted(tmp_path):
    """The whole command with the backend that a GPU would run."""
    command = [sys.executable, "-m", "fastattn", "bench", "--backend", "triton", "--dtype", "float16"]
    command += ["--shape", "1,1,20,16", "--mask", "causal", "--seconds", "0", "--against", "sdpa", "--out"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["contender"] for row in rows if row["milliseconds"]] == ["fastattn", "sdpa"] * 2


@no_gpu
def test_bench_of_an_absent_gpu_ends_with_the_reason(capsys):
    from fastattn.cli import main

    assert main(["bench", "--backend", "triton", "--shape", "1,1,20,16"]) == 2
    assert "torch sees no CUDA or ROCm device" in capsys.readouterr().err
