"""The CUDA backend: a problem becomes the structs of csrc/fastattn.h, the library does the rest.

The library allocates nothing: its workspace is a torch tensor, which the caching allocator hands out again as
soon as the stream is past the call. It works on torch's current stream and never waits for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct

import torch
from torch import Tensor

from ...errors import FastattnError, UnsupportedError
from ...problem import AttentionInputs, AttentionProblem
from .. import Gradients
from ..cpu import abi
from ..cpu.library import LibraryMissingError
from .architectures import Built, version
from .library import open_library

_CACHE_SIZE = 4096
# struct_size, num_splits, stream, workspace, workspace_bytes, dropout_seed
_LAUNCH = struct.Struct("@IiQQqQ")
_WIDEST_FP32_BIAS_GRADIENT = 128  # head_dim above which its tiles do not fit shared memory


def _stand_ins(problem: AttentionProblem) -> AttentionInputs:
    """Tensors where a call of this problem has some, for questions that ask no more than that."""
    x = torch.empty(1, 1, 1, 1)

    def given(present: object, dtype: torch.dtype | None = None) -> Tensor | None:
        return x.to(dtype) if present else None

    return AttentionInputs(
        x, x, x,
        key_mask=given(problem.has_key_mask),
        bias=given(problem.bias_shape, problem.bias_dtype),
        relative_bias=given(problem.has_relative_bias),
        alibi_slopes=given(problem.alibi_shape),
        cu_seqlens_q=given(problem.packed),
        cu_seqlens_k=given(problem.packed),
    )  # fmt: skip


class CudaBackend:
    """Loads libfastattn_cuda when first asked for."""

    name = "cuda"

    def __init__(self) -> None:
        self._library: ctypes.CDLL | None = None
        self._status: str | None = None
        self._asked = False
        self._fixed_parts: dict[AttentionProblem, bytes] = {}
        self._num_sms: dict[int, int] = {}
        self._refused: dict[int, str | None] = {}

    def status(self) -> str | None:
        if not self._asked:
            self._status = self._find()
            self._asked = True
        return self._status

    def _find(self) -> str | None:
        try:
            self._library = open_library()
        except LibraryMissingError as error:
            return str(error)
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA"
        if not torch.cuda.is_available():
            try:
                self._device(0)
            except FastattnError as error:
                return str(error)
            return "torch finds no CUDA device"
        reasons = [self._why_not(index) for index in range(torch.cuda.device_count())]
        return reasons[0] if all(reasons) else None

    def details(self) -> list[str]:
        """What the library was compiled for, the driver, and whether that serves each device.

        Nothing where there is no library.
        """
        self.status()
        if self._library is None:
            return []
        toolkit, driver = self._versions()
        lines = [f"built by CUDA {version(toolkit)}: {self._built()}"]
        lines.append(f"driver: of CUDA {version(driver)}" if driver else "driver: none")
        count = torch.cuda.device_count() if driver and torch.cuda.is_available() else 0
        for index in range(count):
            reason = self._why_not(index)
            if reason is None:
                serves = self._built().has_machine_code(self._device(index)[0])
                reason = "runs its machine code" if serves else "runs its PTX, translated on first use"
            lines.append(f"cuda:{index} {torch.cuda.get_device_name(index)}: {reason}")
        return lines

    def _built(self) -> Built:
        return Built.parse(self._library.fastattn_cuda_architectures().decode())

    def _versions(self) -> tuple[int, int]:
        """CUDA's version when the library was compiled, and the driver's; 0 without a driver."""
        toolkit, driver = ctypes.c_int32(), ctypes.c_int32()
        self._check(self._library.fastattn_cuda_versions(toolkit, driver))
        return toolkit.value, driver.value

    def _why_not(self, index: int) -> str | None:
        """Why this device can't run the library, or None."""
        if index not in self._refused:
            try:
                reason = self._built().why_not(self._device(index)[0], *self._versions())
            except FastattnError as error:
                reason = str(error)
            self._refused[index] = reason
        return self._refused[index]

    def supports(self, problem: AttentionProblem) -> str | None:
        if problem.device.type != "cuda":
            return f"for tensors on a CUDA device, these are on {problem.device}"
        return self._why_not(problem.device.index or 0) or self._refuses(problem)

    def _refuses(self, problem: AttentionProblem) -> str | None:
        if problem.dtype not in abi.DTYPES:
            return f"computes float32, bfloat16 and float16, not {problem.dtype}"
        if problem.bias_dtype not in (None, torch.float32, problem.dtype):
            return f"takes a bias in float32 or q's dtype, not {problem.bias_dtype}"
        wide = max(problem.head_dim, problem.head_dim_v) > _WIDEST_FP32_BIAS_GRADIENT
        has_bias = problem.bias_shape is not None or problem.has_relative_bias
        if problem.need_grad and has_bias and wide and problem.dtype == torch.float32:
            return f"has no bias gradient in float32 for head_dim above {_WIDEST_FP32_BIAS_GRADIENT}"
        return None

    def kernel(self, problem: AttentionProblem) -> str:
        """Architecture and matrix instruction: forward's, and backward's where that is another."""
        inputs = _stand_ins(problem)
        problem_struct = abi.problem_struct(abi.fixed_part(problem), problem, inputs)
        splits = self._library.fastattn_cuda_num_splits(problem_struct, self._sms(problem))
        capability = self.capability(problem.device)
        forward = self._library.fastattn_cuda_forward_kernel(problem_struct, capability, splits)
        backward = self._library.fastattn_cuda_backward_kernels(problem_struct, capability)
        if forward is None or backward is None:
            return "none in this library"
        if not problem.need_grad or forward == backward:
            return forward.decode()
        return f"{forward.decode()}, backward {backward.decode()}"

    def forward(
        self, problem: AttentionProblem, inputs: AttentionInputs, out: Tensor, lse: Tensor | None
    ) -> None:
        with self._guard(problem):
            problem_struct, seed = self._problem(problem, inputs)
            splits = self._library.fastattn_cuda_num_splits(problem_struct, self._sms(problem))
            size = ctypes.c_int64()
            self._check(self._library.fastattn_cuda_forward_workspace(problem_struct, splits, size))
            launch, workspace = self._launch(problem, splits, size.value, seed)
            result = abi.forward_struct(out, lse)
            self._check(self._library.fastattn_cuda_forward(problem_struct, result, launch))
            del workspace

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
        with self._guard(problem):
            problem_struct, seed = self._problem(problem, inputs)
            io = abi.backward_struct(out, dout, lse, dlse, gradients)
            size = ctypes.c_int64()
            self._check(self._library.fastattn_cuda_backward_workspace(problem_struct, io, size))
            launch, workspace = self._launch(problem, 1, size.value, seed)
            self._check(self._library.fastattn_cuda_backward(problem_struct, io, launch))
            del workspace

    def _problem(self, problem: AttentionProblem, inputs: AttentionInputs) -> tuple[bytes, int]:
        """fastattn_problem, and the address of a seed on the device (reading it here would wait)."""
        fixed = self._fixed_parts.get(problem)
        if fixed is None:
            fixed = abi.fixed_part(problem)
            if len(self._fixed_parts) >= _CACHE_SIZE:
                self._fixed_parts.clear()
            self._fixed_parts[problem] = fixed
        seed = inputs.seed
        if seed is None or seed.device.type == "cpu":
            return abi.problem_struct(fixed, problem, inputs), 0
        return abi.problem_struct(fixed, problem, inputs._replace(seed=None)), seed.data_ptr()

    def _launch(self, problem: AttentionProblem, splits: int, size: int, seed: int) -> tuple[bytes, object]:
        workspace = self._allocate(size, problem)
        stream = self._stream(problem)
        return _LAUNCH.pack(_LAUNCH.size, splits, stream, workspace.data_ptr(), size, seed), workspace

    def _check(self, status: int) -> None:
        if status == abi.STATUS_OK:
            return
        message = self._library.fastattn_last_error().decode()
        if status == abi.STATUS_UNSUPPORTED:
            raise UnsupportedError("the CUDA library cannot compute this problem", {"cuda": message})
        raise FastattnError(f"the CUDA library failed with status {status}: {message}")

    def _device(self, index: int) -> tuple[int, int]:
        """(10 * major + minor of the compute capability, multiprocessors)."""
        capability, sms = ctypes.c_int32(), ctypes.c_int32()
        self._check(self._library.fastattn_cuda_device(index, capability, sms))
        return capability.value, sms.value

    def capability(self, device: torch.device) -> int:
        """10 * major + minor of its compute capability."""
        return self._device(device.index or 0)[0]

    def _sms(self, problem: AttentionProblem) -> int:
        index = problem.device.index or 0
        if index not in self._num_sms:
            self._num_sms[index] = self._device(index)[1]
        return self._num_sms[index]

    def _guard(self, problem: AttentionProblem) -> contextlib.AbstractContextManager:
        return torch.cuda.device(problem.device)

    def _stream(self, problem: AttentionProblem) -> int:
        return torch.cuda.current_stream(problem.device).cuda_stream

    def _allocate(self, size: int, problem: AttentionProblem) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=problem.device)


backend = CudaBackend()
