"""Builds csrc/ with CMake and Ninja into fastattn/_native; pyproject.toml declares everything else.

The native library knows neither Python nor torch (its interface is the C ABI of csrc/fastattn.h), so
one wheel per platform serves every Python: py3-none-<platform>. FASTATTN_SKIP_NATIVE=1 leaves the
library out and puts a file SKIPPED in its place, whose text the CPU backend gives as its reason.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
NATIVE = Path("fastattn", "_native")
SKIPPED = "fastattn was installed with FASTATTN_SKIP_NATIVE=1, that is, without its native library."


def skip_native() -> bool:
    return os.environ.get("FASTATTN_SKIP_NATIVE", "0") not in ("", "0")


def find_compiler() -> str:
    """The C++ compiler that CMake will use: $CXX, or the first of the usual names."""
    asked = os.environ.get("CXX")
    names = shlex.split(asked)[:1] if asked else ["c++", "g++", "clang++"]
    for name in names:
        if shutil.which(name):
            return name
    what = f"CXX={asked!r} is not a program on PATH" if asked else f"none of {', '.join(names)} is on PATH"
    raise SystemExit(
        f"fastattn needs a C++ compiler to build its CPU kernels, and {what}: install one "
        "(Debian and Ubuntu: apt install g++), or set FASTATTN_SKIP_NATIVE=1 to install without them."
    )


def find_tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise SystemExit(f"fastattn needs {name} to build its CPU kernels: pip install {name}.")
    return path


class BuildNative(Command):
    """Compile csrc/ and put the libraries into the build tree, or in place (editable installs)."""

    description = "build the native libraries with CMake"
    user_options = [
        ("inplace", "i", "put the libraries into the source tree"),
        ("build-lib=", "b", "directory"),
    ]
    boolean_options = ["inplace"]

    def initialize_options(self):
        self.inplace = False
        self.editable_mode = False
        self.build_lib = None
        self.build_base = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"), ("build_base", "build_base"))

    def run(self):
        in_tree = self.inplace or self.editable_mode
        destination = (ROOT if in_tree else Path(self.build_lib).resolve()) / NATIVE
        destination.mkdir(parents=True, exist_ok=True)
        if skip_native():
            for library in destination.glob("libfastattn_*"):
                library.unlink()
            (destination / "SKIPPED").write_text(SKIPPED + "\n", encoding="utf-8")
            return
        (destination / "SKIPPED").unlink(missing_ok=True)
        self.compile(destination)

    def compile(self, destination: Path):
        compiler = find_compiler()
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        tree = Path(self.build_base).resolve() / "native"
        # The program is named at each call, because pip's isolated build environment, where the last
        # call may have found its ninja, is gone by now.
        configure = [cmake, "-S", ROOT / "csrc", "-B", tree, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={destination}"]
        for command in (configure, [cmake, "--build", tree, "--target", "fastattn_cpu"]):
            print("+", shlex.join(map(str, command)), flush=True)
            if subprocess.run(command).returncode != 0:
                raise SystemExit(
                    f"fastattn's CPU kernels did not build with {compiler}; its messages stand above. "
                    "FASTATTN_SKIP_NATIVE=1 installs without them."
                )

    def get_source_files(self):
        return [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file()]

    def get_outputs(self):
        directory = Path(self.build_lib) / NATIVE
        return [str(p) for p in directory.glob("*") if p.suffix != ".py"]

    def get_output_mapping(self):
        return {}


class Build(build):
    sub_commands = [*build.sub_commands, ("build_native", None)]


class Wheel(bdist_wheel):
    def get_tag(self):
        return ("py3", "none", "any" if skip_native() else super().get_tag()[2])


class NativeDistribution(Distribution):
    def has_ext_modules(self):
        return not skip_native()


setup(
    distclass=NativeDistribution, cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel}
)
