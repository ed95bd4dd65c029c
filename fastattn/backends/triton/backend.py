"""The Triton backend.

What a GPU user has from a plain pip install. Imports triton when it is first asked for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ...problem import AttentionInputs, AttentionProblem, check_offsets
from .. import Gradients
from . import configs
from .device import on_device

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST_NVIDIA = 80  # Triton 3.9 makes no use of Turing's tensor cores


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors.

    It reads this when kernels are defined.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


class TritonBackend:
    """Compiles a kernel when a problem first needs it.

    Results are deterministic: no kernel adds atomically.
    """

    name = "triton"

    def __init__(self) -> None:
        self._status: str | None = None
        self._asked = False
        self._devices: dict[int, tuple[configs.Arch, int]] = {}

    def status(self) -> str | None:
        if not self._asked:
            self._status = _why_unavailable()
            self._asked = True
        return self._status

    def details(self) -> list[str]:
        return []  # kernels are compiled for whatever device there is

    def supports(self, problem: AttentionProblem) -> str | None:
        wanted = "cpu" if interpreting() else "cuda"
        if problem.device.type != wanted:
            return f"for tensors on a {wanted} device, these are on {problem.device}"
        if problem.dtype not in _DTYPES:
            return f"computes float32, bfloat16 and float16, not {problem.dtype}"
        arch, _ = self._device(problem.device)
        if isinstance(arch, int) and arch < _OLDEST_NVIDIA:
            return f"needs compute capability {_OLDEST_NVIDIA / 10}, {problem.device} has {arch / 10}"
        if isinstance(arch, int) and 90 <= arch < 120:
            return _why_not_fenced(arch)
        return None

    def kernel(self, problem: AttentionProblem) -> str:
        from . import launch
        from .arguments import precision

        arch, processors = self._device(problem.device)
        config, fold_heads, splits = launch.plan_forward(
            problem, arch, processors, precision(problem.dtype, arch)
        )
        name = arch if isinstance(arch, str) else f"sm_{arch}"
        decoding = f", heads folded, keys split {splits} ways" if fold_heads else ""
        tuning = ", or what tuning finds" if launch.tuning() else ""
        return f"{name} {config}{tuning}{decoding}"

    def forward(
        self, problem: AttentionProblem, inputs: AttentionInputs, out: Tensor, lse: Tensor | None
    ) -> None:
        from . import launch

        with self._on(problem, inputs):
            launch.forward(problem, inputs, out, lse, *self._device(problem.device))

    def backward(
        self,
        problem: AttentionProblem,
        inputs: AttentionInputs,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        gradients: Gradients,
    ) -> None:
        from . import launch

        arch, _ = self._device(problem.device)
        with self._on(problem, inputs):
            launch.backward(problem, inputs, out, lse, dout, dlse, gradients, arch)

    def rotary(
        self, xs: Sequence[Tensor], outs: Sequence[Tensor], cos: Tensor, sin: Tensor, transposed: bool
    ) -> None:
        """See `fastattn.rotary`; all of unit last stride."""
        from . import rotary

        rotary.rotate(xs, outs, cos, sin, transposed)

    def _on(self, problem: AttentionProblem, inputs: AttentionInputs) -> contextlib.AbstractContextManager:
        """Kernels go to the problem's device. Interpreted, offsets can be read, so check them."""
        if problem.device.type == "cpu" and problem.packed:
            check_offsets("cu_seqlens_q", inputs.cu_seqlens_q, problem.total_q, problem.seqlen_q)
            check_offsets("cu_seqlens_k", inputs.cu_seqlens_k, problem.total_k, problem.seqlen_k)
        return on_device(problem.device)

    def _device(self, device: torch.device) -> tuple[configs.Arch, int]:
        """(architecture, multiprocessors) of a device."""
        if device.type == "cpu":
            return configs.INTERPRETER, 4
        index = torch.cuda.current_device() if device.index is None else device.index
        if index not in self._devices:
            properties = torch.cuda.get_device_properties(index)
            if torch.version.hip:
                arch: configs.Arch = properties.gcnArchName.split(":")[0]
            else:
                arch = properties.major * 10 + properties.minor
            self._devices[index] = arch, properties.multi_processor_count
        return self._devices[index]


def _why_not_fenced(arch: int) -> str | None:
    """These parts' matrix units read shared memory by another path than the copies that fill it.

    Releases before 3.7 leave out the fence between the two in pipelined loops (docs/proof-triton.md).
    """
    from triton import __version__ as release

    major, minor = release.split(".")[:2]
    if (int(major), int(minor)) >= (3, 7):
        return None
    return (
        f"Triton {release} leaves a memory fence out of code for compute capability {arch / 10}: "
        f"needs Triton 3.7 or newer"
    )


def _why_unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package 'triton' is not installed: pip install 'fastattn[gpu]'"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return (
            "torch sees no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels on the CPU, to test them)"
        )
    return None


backend = TritonBackend()
