"""The CUDA backend on a simulated device: everything of it runs, down to the PTX that nvcc made.

The library is built as for users, but against fake_cudart.cpp in place of the CUDA runtime, which hands each
launch to this file, and this file to tests/ptxsim. So the tests cover the Python backend, the ABI, the host
code with its workspace and grids, and the kernels, with every access to memory checked.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
from ptxsim.launch import Layout, Options, Report, _run_grid
from ptxsim.memory import GlobalMemory
from ptxsim.parser import Module, parse
from torch import Tensor

from fastattn.backends import Gradients
from fastattn.backends.cuda.backend import CudaBackend
from fastattn.backends.cuda.library import open_library
from fastattn.problem import AttentionInputs

ROOT = Path(__file__).parents[3]
VARIANTS = "plain;dropout;softcap;alibi;relative;bias;all"  # all of the table in csrc/cuda/CMakeLists.txt
LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)


def why_not() -> str | None:
    """The reason why the library cannot be built here, or None."""
    missing = [tool for tool in ("nvcc", "cmake", "ninja") if shutil.which(tool) is None]
    return f"{', '.join(missing)} not on PATH" if missing else None


def build(folder: Path, dims: str, types: str, variants: str, *, real_runtime: bool = False) -> Path:
    """The library of a part of the table, in `folder`; its PTX files lie beside it. Cheap when up to date."""
    folder.mkdir(parents=True, exist_ok=True)
    fake = Path(__file__).with_name("fake_cudart.cpp")
    runtime = ["Static", ""] if real_runtime else ["None", fake]
    configure = [
        "cmake", "-S", ROOT / "csrc" / "cuda", "-B", folder, "-G", "Ninja",
        "-DCMAKE_CUDA_ARCHITECTURES=80-virtual", f"-DCMAKE_CUDA_RUNTIME_LIBRARY={runtime[0]}",
        f"-DFASTATTN_CUDA_DIMS={dims}", f"-DFASTATTN_CUDA_TYPES={types}",
        f"-DFASTATTN_CUDA_VARIANTS={variants}", f"-DFASTATTN_CUDA_TEST_SOURCES={runtime[1]}",
        "-DFASTATTN_CUDA_HOPPER=90a-virtual",
        "-DCMAKE_CUDA_FLAGS=--keep --keep-dir .",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", folder]):
        done = subprocess.run([os.fspath(part) for part in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder / "libfastattn_cuda.so"


@functools.lru_cache(maxsize=8)
def parsed(path: Path) -> Module:
    """The kernels of a PTX file."""
    return parse(path.read_text())


class DeviceTensor:
    """A torch tensor that says it lies in simulated memory."""

    def __init__(self, tensor: Tensor, memory: GlobalMemory, mode: str, name: str):
        self._tensor, self._address = tensor, memory.add(tensor, mode, name).address

    def data_ptr(self) -> int:
        return self._address

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")

    def __getattr__(self, name: str):
        return getattr(self._tensor, name)


class SimulatedCuda(CudaBackend):
    """Takes CPU tensors where CudaBackend takes those of a GPU; a fresh device for every call."""

    name = "cpu"  # what dispatch knows for tensors on the CPU

    def __init__(self, library: Path):
        super().__init__()
        self._library = open_library(library)
        self._asked = True
        self._ptx = {
            name: path
            for path in library.parent.glob("*.ptx")
            for name in re.findall(r"\.entry (\w+)\(", path.read_text())
        }
        self._callback = LAUNCH(self._run)
        self._library.fake_cudart_on_launch(self._callback)
        self.num_sms = 1
        self.options = Options()
        self.launches: list[tuple[str, Report]] = []  # of the last call
        self._recorders: list[list[tuple[str, Report]]] = []
        self.seed_on_device = False
        self._failure: BaseException | None = None

    def set_capability(self, capability: int) -> None:
        """10 * major + minor of the device to be simulated; the library's default is 80."""
        self._library.fake_cudart_set_capability(capability)

    @contextlib.contextmanager
    def recorded(self, **options):
        """A list that receives the launches of every call within; `options` of the simulator hold there."""
        default, launches = self.options, []
        self.options = Options(**{**vars(default), **options})
        self._recorders.append(launches)
        try:
            yield launches
        finally:
            self._recorders.pop()
            self.options = default

    def text(self) -> str:
        """The PTX of all kernels."""
        return "".join(path.read_text() for path in sorted(set(self._ptx.values())))

    def text_of(self, name: str) -> str:
        """The PTX of one kernel alone, with the variables declared in front of others."""
        text = self._ptx[name].read_text()
        starts = [found.start() for found in re.finditer(r"^(\.visible |\.weak )?\.entry ", text, flags=re.M)]
        kernels = [text[begin:end] for begin, end in zip(starts, [*starts[1:], None], strict=True)]
        kernel = next(kernel for kernel in kernels if re.search(r"\.entry (\w+)\(", kernel)[1] == name)
        variables = re.findall(r"^\.(?:extern|global|const|shared) [^;(]*;", text, flags=re.M)
        head = text[: starts[0]]
        return head + "".join(f"{x}\n" for x in variables if x not in head and x not in kernel) + kernel

    def supports(self, problem) -> str | None:
        return self._refuses(problem)

    def forward(self, problem, inputs, out, lse) -> None:
        with self._device_memory():
            lse = lse if lse is None else self._put(lse, "out", "lse")
            super().forward(problem, self._inputs(inputs), self._put(out, "out", "out"), lse)

    def backward(self, problem, inputs, out, lse, dout, dlse, gradients) -> None:
        with self._device_memory():
            read = [
                x if x is None else self._put(x, "in", name)
                for x, name in ((out, "out"), (lse, "lse"), (dout, "dout"), (dlse, "dlse"))
            ]
            written = Gradients(
                *(
                    x if x is None else self._put(x, "out", name)
                    for name, x in zip(Gradients._fields, gradients, strict=True)
                )
            )
            super().backward(problem, self._inputs(inputs), *read, written)

    @contextlib.contextmanager
    def _device_memory(self):
        self._memory, self.launches, self._failure = GlobalMemory(), [], None
        try:
            yield
        except Exception:
            if self._failure is not None:
                raise self._failure from None
            raise
        self._memory.write_back()

    def _put(self, tensor: Tensor, mode: str, name: str) -> DeviceTensor:
        return DeviceTensor(tensor, self._memory, mode, name)

    def _inputs(self, inputs: AttentionInputs) -> AttentionInputs:
        return AttentionInputs(
            *(
                x if x is None or (name == "seed" and not self.seed_on_device) else self._put(x, "in", name)
                for name, x in zip(AttentionInputs._fields, inputs, strict=True)
            )
        )

    def _allocate(self, size: int, problem) -> DeviceTensor:
        workspace = self._put(torch.empty(size, dtype=torch.uint8), "out", "workspace")
        self._memory.commit()
        return workspace

    def _guard(self, problem):
        return contextlib.nullcontext()

    def _stream(self, problem) -> int:
        return 0

    def _sms(self, problem) -> int:
        return self.num_sms

    def _run(self, name, grid, block, shared_bytes, arguments) -> int:
        """One launch, as the fake runtime reports it. Returns 1, and keeps the exception, where it fails."""
        try:
            module = parsed(self._ptx[name.decode()])
            kernel = module.kernels[name.decode()]
            layout = Layout(module, kernel, shared_bytes)
            packed = bytearray(max(layout.param_size, 1))
            for parameter, address in zip(kernel.params, arguments[: len(kernel.params)], strict=True):
                at = layout.symbols[parameter.name]
                packed[at : at + parameter.size] = ctypes.string_at(address, parameter.size)
            layout.param_bytes = np.frombuffer(bytes(packed), np.uint8)
            report = Report(kernel)
            dims = ((grid, 1, 1), (block, 1, 1))
            with np.errstate(all="ignore"):
                _run_grid(kernel, layout, *dims, self._memory, self.options, report)
            for launches in (self.launches, *self._recorders):
                launches.append((kernel.name, report))
            return 0
        except BaseException as error:  # nothing may be raised through the C frames
            self._failure = error
            return 1
