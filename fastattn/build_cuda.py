"""`fastattn build-cuda`: compile csrc/cuda with nvcc into this installation.

nvcc is taken from --nvcc, $CUDA_HOME/bin, PATH, or the packages that PyPI has it in (extra `cuda-build`).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .errors import FastattnError, MissingDependencyError

_ROOT = Path(__file__).parents[1]
_NATIVE = Path(__file__).parent / "_native"
DIMS = (32, 64, 96, 128, 256)
TYPES = ("f16", "bf16", "f32")
OLDEST_ARCHITECTURE = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", type=Path, default=_ROOT / "csrc", help="csrc of fastattn's source tree")
    parser.add_argument("--nvcc", type=Path, help="default: of $CUDA_HOME, PATH or PyPI's package")
    parser.add_argument(
        "--architectures", type=int, nargs="+", default=[OLDEST_ARCHITECTURE], metavar="SM",
        help="machine code for these, such as 80 90 120, and PTX of the newest; default: 80, which newer "
        "devices translate on first use; Hopper's own kernels are always added",
    )  # fmt: skip
    parser.add_argument("--dims", type=int, nargs="+", choices=DIMS, default=DIMS, help="head dimensions")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES, help="element types")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at once")


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    source = arguments.source / "cuda"
    if not (source / "CMakeLists.txt").is_file():
        raise FastattnError(
            f"no CUDA sources in {source}: give --source the csrc folder of fastattn's source distribution "
            "(pip download --no-binary fastattn --no-deps fastattn)"
        )
    if min(arguments.architectures) < OLDEST_ARCHITECTURE:
        raise FastattnError(
            f"--architectures {min(arguments.architectures)}: the oldest that serves is {OLDEST_ARCHITECTURE}"
        )
    nvcc = find_nvcc(arguments.nvcc)
    with tempfile.TemporaryDirectory(prefix="fastattn-cuda-") as folder:
        for command in commands(arguments, source, nvcc, Path(folder)):
            print("+", shlex.join(command), flush=True)
            if subprocess.run(command).returncode != 0:
                raise FastattnError(f"{command[0]} failed; its messages stand above")
    print(f"built {_NATIVE}/libfastattn_cuda; `fastattn doctor` says whether this driver runs it")
    return 0


def commands(arguments: argparse.Namespace, source: Path, nvcc: Path, folder: Path) -> list[list[str]]:
    """Configure and build, as argument lists."""
    cmake, ninja = _tool("cmake"), _tool("ninja")
    *older, newest = sorted(set(arguments.architectures))
    architectures = ";".join([*(f"{sm}-real" for sm in older), str(newest)])
    configure = [
        cmake, "-S", str(source), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}",
        f"-DFASTATTN_OUTPUT_DIR={_NATIVE}", f"-DFASTATTN_CUDA_DIMS={';'.join(map(str, arguments.dims))}",
        f"-DFASTATTN_CUDA_TYPES={';'.join(arguments.types)}",
    ]  # fmt: skip
    return [configure, [cmake, "--build", str(folder), "--parallel", str(max(1, arguments.jobs))]]


def find_nvcc(asked: Path | None = None) -> Path:
    """The compiler, or MissingDependencyError."""
    if asked is not None:
        if not asked.is_file():
            raise FastattnError(f"--nvcc {asked} is not a file")
        return asked
    home = os.environ.get("CUDA_HOME")
    on_path = shutil.which("nvcc")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    candidates += [Path(on_path)] if on_path else []
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations if packages else ():
        candidates += sorted(Path(folder).glob("*/bin/nvcc"), reverse=True)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise MissingDependencyError("nvcc", "cuda-build")


def _tool(name: str) -> str:
    """A program on PATH, or beside this Python, where pip puts what it installs."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise MissingDependencyError(name, "cuda-build")
    return found
