"""Copies of the project to build in, and how to build there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = "pyproject.toml setup.py MANIFEST.in README.md LICENSE CHANGELOG.md CONTRIBUTING.md Makefile"
SOURCES = [*FILES.split(), "constraints.txt", ".clang-format", ".pre-commit-config.yaml", ".ci"]
SOURCES += ["fastattn", "csrc", "tests", "benchmarks", "examples", "docs"]

# A library of one function in the place of the kernels: what is tested is the way there, in seconds.
STUB_CMAKE = """\
cmake_minimum_required(VERSION 3.18)
project(fastattn LANGUAGES CXX)
add_library(fastattn_cpu SHARED stub.cpp)
"""
STUB_SOURCE = '#include "fastattn.h"\nint32_t fastattn_abi_version(void) { return FASTATTN_ABI_VERSION; }\n'


def copy_sources(to: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib", "SKIPPED", "*.egg-info")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=ignore)
        elif source.exists():
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to / name)
    return to


def stub_kernels(tree: Path) -> None:
    """Let csrc/ build a library of one function."""
    (tree / "csrc" / "CMakeLists.txt").write_text(STUB_CMAKE, encoding="utf-8")
    (tree / "csrc" / "stub.cpp").write_text(STUB_SOURCE, encoding="utf-8")


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command as a user would in a fresh shell; the output holds stdout and stderr together."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FASTATTN_", "CXX"))}
    clean["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), clean.get("PATH", "")])
    return subprocess.run(
        command,
        cwd=cwd,
        env={**clean, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def build_wheel(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """pip wheel with the build tools of this environment, so that no index is asked."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"]
    return run([*command, "--wheel-dir", "wheels", "."], tree, **environment)
