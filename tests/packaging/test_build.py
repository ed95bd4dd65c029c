"""What `pip install .` and `python -m build` make, and what they say when they can't."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from building import build_wheel, run

pytest.importorskip("setuptools", minversion="77")
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)
LIBRARY = "fastattn/_native/libfastattn_cpu" + {"darwin": ".dylib"}.get(sys.platform, ".so")


def the_wheel(tree: Path) -> zipfile.ZipFile:
    (path,) = (tree / "wheels").glob("*.whl")
    return zipfile.ZipFile(path)


@needs_compiler
def test_wheel_serves_every_python_on_this_platform(stub_tree):
    done = build_wheel(stub_tree)
    assert done.returncode == 0, done.stdout
    with the_wheel(stub_tree) as wheel:
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        assert Path(wheel.filename).name.endswith(f"-py3-none-{platform}.whl")
        names = set(wheel.namelist())
        tag = next(n for n in names if n.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: false" in wheel.read(tag).decode()
        metadata = wheel.read(tag.replace("WHEEL", "METADATA")).decode()
    assert LIBRARY in names
    sources = {p.relative_to(stub_tree).as_posix() for p in (stub_tree / "fastattn").rglob("*.py")}
    assert sources <= names
    data = {"fastattn/py.typed", "fastattn/bench/peak.cpp"}
    assert {n for n in names if ".dist-info/" not in n} - sources == {LIBRARY, *data}, "something else got in"
    always = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert always == ["Requires-Dist: torch>=2.9"]
    assert "License-Expression: Apache-2.0" in metadata


@needs_compiler
def test_a_second_build_in_another_environment_is_not_confused_by_the_first(stub_tree, tmp_path):
    """pip's isolated environments are gone after the build; what CMake cached from them must not matter."""
    tools = tmp_path / "soon gone"
    tools.mkdir()
    for tool in ("cmake", "ninja"):
        found = shutil.which(
            tool, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        )
        (tools / tool).write_text(f'#!/bin/sh\nexec "{found}" "$@"\n')
        (tools / tool).chmod(0o755)
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    first = build_wheel(stub_tree, PATH=path)
    assert first.returncode == 0, first.stdout
    shutil.rmtree(tools)
    second = build_wheel(stub_tree)
    assert second.returncode == 0, second.stdout


def test_skip_native_gives_a_pure_wheel_that_says_why(stub_tree):
    (stub_tree / "build" / "lib" / "fastattn" / "_native").mkdir(parents=True)
    (stub_tree / "build" / "lib" / LIBRARY).write_text("left over from an earlier build")
    done = build_wheel(stub_tree, FASTATTN_SKIP_NATIVE="1", PATH="/nonexistent")
    assert done.returncode == 0, done.stdout
    with the_wheel(stub_tree) as wheel:
        assert wheel.filename.endswith("-py3-none-any.whl")
        assert LIBRARY not in wheel.namelist()
        assert "FASTATTN_SKIP_NATIVE=1" in wheel.read("fastattn/_native/SKIPPED").decode()


@pytest.mark.parametrize("compiler", [None, "no-such-compiler"])
def test_without_a_compiler_one_sentence_says_what_is_missing(stub_tree, tmp_path, compiler):
    tools = tmp_path / "tools"
    tools.mkdir()
    environment = {"PATH": str(tools)}
    if compiler:
        environment["CXX"] = compiler
    done = build_wheel(stub_tree, **environment)
    assert done.returncode != 0
    sentence = next(line for line in done.stdout.splitlines() if "C++ compiler" in line)
    assert "FASTATTN_SKIP_NATIVE=1" in sentence
    assert (compiler or "g++") in sentence
    assert "Traceback" not in done.stdout


@needs_compiler
def test_what_does_not_compile_is_said_after_the_compilers_own_words(stub_tree):
    (stub_tree / "csrc" / "stub.cpp").write_text("int broken(", encoding="utf-8")
    done = build_wheel(stub_tree)
    assert done.returncode != 0
    assert "stub.cpp:1" in done.stdout
    assert "fastattn's CPU kernels did not build" in done.stdout
    assert "Traceback" not in done.stdout


@needs_compiler
def test_editable_puts_the_library_into_the_source_tree(stub_tree):
    command = [sys.executable, "-c", "import setuptools.build_meta as b; print(b.build_editable('.'))"]
    done = run(command, stub_tree)
    assert done.returncode == 0, done.stdout
    assert (stub_tree / LIBRARY).exists()


@needs_compiler
def test_sdist_builds_alone(stub_tree, tmp_path):
    """From the source distribution and nothing else, a wheel of the same content."""
    done = run([sys.executable, "-c", "import setuptools.build_meta as b; b.build_sdist('dist')"], stub_tree)
    assert done.returncode == 0, done.stdout
    (path,) = (stub_tree / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "unpacked", filter="data")
    assert not [n for n in names if n.endswith((".so", ".pyc"))]
    (tree,) = (tmp_path / "unpacked").iterdir()
    needed = "csrc/fastattn.h csrc/tests/run.sh tests/packaging/test_build.py docs/installation.md .ci/run"
    for name in [*needed.split(), "Makefile", "constraints.txt", "LICENSE"]:
        assert (tree / name).exists(), name
    done = build_wheel(tree)
    assert done.returncode == 0, done.stdout
    with the_wheel(tree) as wheel:
        assert LIBRARY in wheel.namelist()


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_wheel_from_sdist_installs_and_computes(source_tree, tmp_path):
    """`python -m build`, and the wheel in an environment of its own with this one's torch."""
    done = run([sys.executable, "-m", "build", "--no-isolation", "--outdir", "wheels", "."], source_tree)
    assert done.returncode == 0, done.stdout
    (wheel,) = (source_tree / "wheels").glob("*.whl")
    target = tmp_path / "installed"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(pip, check=True)
    code = (
        "import torch, fastattn; q = torch.randn(1, 2, 33, 16)\n"
        "assert fastattn.__file__.startswith(PATH), fastattn.__file__\n"
        "torch.testing.assert_close(fastattn.attention(q, q, q, backend='cpu'),\n"
        "    fastattn.attention(q, q, q, backend='reference'))\n"
    )
    code = f"import sys; PATH = {str(target)!r}; sys.path.insert(0, PATH)\n{code}"
    done = run([sys.executable, "-c", code], tmp_path)
    assert done.returncode == 0, done.stdout
