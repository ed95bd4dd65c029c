"""What the backend says without a device: why it is not there, what it refuses."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
import simulated
import torch

from fastattn import build_cuda
from fastattn.backends import Backend
from fastattn.backends.cpu.library import LibraryMissingError
from fastattn.backends.cuda import backend
from fastattn.backends.cuda.backend import CudaBackend
from fastattn.backends.cuda.library import PATH, open_library
from fastattn.errors import FastattnError, MissingDependencyError
from fastattn.problem import AttentionInputs, AttentionOptions, describe


def problem(dtype=torch.float16, head_dim=64, need_grad=True, **tensors):
    q = torch.zeros(1, 2, 4, head_dim, dtype=dtype)
    options = AttentionOptions(False, 0.1, -1, -1, 0.0, 0.0, 0, 0)
    return describe(AttentionInputs(q, q, q, **tensors), options, need_grad)


def test_is_a_backend():
    assert isinstance(backend, Backend)


@pytest.mark.skipif(torch.cuda.is_available() and PATH.exists(), reason="the backend is available here")
def test_status_says_what_to_do():
    reason = backend.status()
    assert "fastattn build-cuda" in reason if not PATH.exists() else reason


def test_missing_library_names_the_command(tmp_path):
    with pytest.raises(LibraryMissingError, match="fastattn build-cuda"):
        open_library(tmp_path / "libfastattn_cuda.so")


def test_foreign_library_is_refused(tmp_path):
    path = tmp_path / "libfastattn_cuda.so"
    path.write_bytes(b"not a library")
    with pytest.raises(LibraryMissingError, match="does not load"):
        open_library(path)


def test_refusals_have_reasons():
    cuda = CudaBackend()
    assert "on cpu" in cuda.supports(problem())
    assert cuda._refuses(problem()) is None
    assert "float64" in cuda._refuses(problem(torch.float64))
    bias = torch.zeros(1, 2, 4, 4)
    assert cuda._refuses(problem(bias=bias)) is None
    assert "bias" in cuda._refuses(problem(bias=bias.bfloat16()))
    assert "256" not in (cuda._refuses(problem(head_dim=256, bias=bias)) or "")
    assert "128" in cuda._refuses(problem(torch.float32, 256, bias=bias))
    assert cuda._refuses(problem(torch.float32, 256, need_grad=False, bias=bias)) is None


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    build_cuda.add_arguments(parser)
    return parser.parse_args(words)


def test_build_refuses_what_it_cannot_build(tmp_path):
    with pytest.raises(FastattnError, match="no CUDA sources"):
        build_cuda.run(parsed("--source", str(tmp_path)), [])
    with pytest.raises(FastattnError, match="70"):
        build_cuda.run(parsed("--architectures", "70"), [])
    with pytest.raises(FastattnError, match="not a file"):
        build_cuda.find_nvcc(tmp_path / "nvcc")


def test_build_finds_nvcc_where_it_is(tmp_path, monkeypatch):
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build_cuda.find_nvcc() == compiler
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build_cuda.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="cuda-build"):
        build_cuda.find_nvcc()


def test_build_commands_are_the_arguments():
    arguments = parsed("--architectures", "90", "80", "--dims", "64", "--types", "bf16", "--jobs", "3")
    configure, build = build_cuda.commands(arguments, Path("csrc/cuda"), Path("/x/nvcc"), Path("/y"))
    assert "-DCMAKE_CUDA_ARCHITECTURES=80-real;90" in configure
    assert "-DFASTATTN_CUDA_DIMS=64" in configure
    assert "-DFASTATTN_CUDA_TYPES=bf16" in configure
    assert build[-2:] == ["--parallel", "3"]


def test_a_build_that_fails_says_so(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(build_cuda, "_NATIVE", tmp_path)
    compiler = tmp_path / "nvcc"
    compiler.touch()
    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    monkeypatch.setattr(build_cuda, "commands", lambda *_: [failing])
    with pytest.raises(FastattnError, match="failed; its messages stand above"):
        build_cuda.run(parsed("--nvcc", str(compiler)), [])
    assert "SystemExit(3)" in capfd.readouterr().out, "the command is shown"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_build_of_one_head_dimension(monkeypatch, tmp_path):
    """The command from end to end, in a folder of its own."""
    reason = simulated.why_not()
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(build_cuda, "_NATIVE", tmp_path)
    assert build_cuda.run(parsed("--dims", "64", "--types", "f16", "--architectures", "80", "86"), []) == 0
    (path,) = tmp_path.iterdir()
    assert path.name == PATH.name
    library = open_library(path)
    assert library.fastattn_cuda_architectures() == b"80-real,86,90a-real"
