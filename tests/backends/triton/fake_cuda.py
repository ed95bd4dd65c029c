"""Triton's whole launch path on CPU tensors, down to a libcuda.so.1 of our own (fake_libcuda.c).

The JIT specialises and compiles as for a GPU of the architecture asked for, Triton's launcher in C packs the
parameters, and what reaches cuLaunchKernelEx is run by tests/ptxsim: from the packed bytes, so that an
argument of the wrong width or in the wrong place shows. Without the simulator nothing runs, which leaves the
Python cost of a launch to be measured.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import torch
from ptxsim import run_ptx, why_no_triton
from ptxsim.parser import parse

CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_uint64,
    *[ctypes.c_uint] * 5,
    ctypes.POINTER(ctypes.c_void_p),
)


def compiler() -> str | None:
    return next(
        (name for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and shutil.which(name)), None
    )


def why_not() -> str | None:
    """The reason why the fake driver can't be used here, or None."""
    if why_no_triton() is not None:
        return why_no_triton()
    if torch.cuda.is_available():
        return "a real CUDA driver is loaded; test_gpu.py uses that one"
    return None if compiler() else "no C compiler, which Triton's launcher needs"


def build(folder: Path) -> Path:
    """libcuda.so.1 in `folder`, compiled against the cuda.h that Triton ships."""
    source, library = Path(__file__).with_name("fake_libcuda.c"), folder / "libcuda.so.1"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        package = Path(importlib.util.find_spec("triton").origin).parent
        include = package / "backends" / "nvidia" / "include"
        command = [compiler(), "-O2", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
        (folder / "libcuda.so").unlink(missing_ok=True)
        (folder / "libcuda.so").symlink_to(library.name)  # what Triton before 3.9 links with
    return library


class FakeCuda:
    """A driver for `arch`; `install` and `remove` put it in Triton's place and take it out.

    kernels: the names of the kernels loaded, which are those compiled. launches: (name, grid, arguments,
    Report) of each launch simulated.
    """

    def __init__(self, folder: Path, arch: int, simulate: bool = True):
        from triton import knobs
        from triton.backends.nvidia import driver as nvidia

        library = ctypes.CDLL(str(build(folder)), mode=ctypes.RTLD_GLOBAL)
        knobs.nvidia.libcuda_path = str(folder)
        self.kernels: list[str] = []
        self.launches: list[tuple] = []
        self._library, self._simulate = library, simulate
        self._loaded: dict[int, tuple[str, str]] = {}
        self._arguments: list = []
        self._failure: BaseException | None = None
        self._callback = CALLBACK(self._on_launch)
        fake = self

        class Launcher(nvidia.CudaLauncher):
            """Keeps the arguments as Python has them, to be compared with what C made of them."""

            def __init__(self, source, metadata):
                super().__init__(source, metadata)
                self.passed = [typ != "constexpr" for typ in source.signature.values()]

            def __call__(self, *everything):
                given = everything[9:]
                fake._arguments = [x for x, passed in zip(given, self.passed, strict=True) if passed]
                try:
                    super().__call__(*everything)
                except RuntimeError:
                    if fake._failure is not None:
                        raise fake._failure from None
                    raise

        class Driver(nvidia.CudaDriver):
            def __init__(self):
                self.utils = nvidia.CudaUtils()
                self.launcher_cls = Launcher if simulate else nvidia.CudaLauncher
                self.get_current_device = lambda: arch
                self.get_current_stream = lambda device: 0
                self.get_device_capability = lambda device: divmod(device, 10)

        self._driver = Driver()

    def install(self) -> None:
        from triton import knobs
        from triton.runtime import driver

        driver.set_active(self._driver)
        knobs.runtime.kernel_load_end_hook = self._on_load
        self._library.fake_cuda_on_launch(self._callback if self._simulate else None)

    def remove(self) -> None:
        from triton import knobs
        from triton.runtime import driver

        driver._active = None
        knobs.runtime.kernel_load_end_hook = None
        self._library.fake_cuda_on_launch(None)

    def _on_load(self, module, function, name, files, digest) -> None:
        self.kernels.append(name)
        self._loaded[function] = name, Path(files[f"{name}.ptx"]).read_text()

    def _on_launch(self, function, x, y, z, block, shared, params) -> int:
        grid = x, y, z
        try:
            name, ptx = self._loaded[function]
            (kernel,) = parse(ptx).kernels.values()
            values = []
            for index, parameter in enumerate(kernel.params):
                raw = ctypes.string_at(params[index], parameter.size)
                given = self._arguments[index] if index < len(self._arguments) else None
                if isinstance(given, torch.Tensor):
                    assert int.from_bytes(raw, "little") == given.data_ptr(), parameter.name
                    values.append(given)
                else:
                    values.append(raw)
            report = run_ptx(ptx, name, grid=grid, block=block, args=values, shared=shared)
            self.launches.append((name, grid, self._arguments, report))
        except BaseException as failure:
            self._failure = failure
            return 1
        return 0
