"""The CPU backend: a problem becomes the structs of csrc/fastattn.h, the library does the rest."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...errors import FastattnError, UnsupportedError
from ...problem import AttentionInputs, AttentionProblem, check_offsets
from .. import Gradients
from . import abi
from .library import PATH, LibraryMissingError, open_library, torch_parallel_for

_CACHE_SIZE = 4096
# From there on split products are faster than fp32's, where the library has them (docs/performance-cpu.md).
_SPLIT_SEQLEN, _SPLIT_HEAD_DIM = 512, 64


class CpuBackend:
    """Loads libfastattn_cpu when first asked for; starts no thread of its own while torch lends its pool."""

    name = "cpu"

    def __init__(self, path: Path = PATH) -> None:
        self._path = path
        self._library: ctypes.CDLL | None = None
        self._unavailable: str | None = None
        self._parallel_for = 0
        self._fixed_parts: dict[int, dict[AttentionProblem, bytes]] = {
            dtype: {} for dtype in abi.PROBLEM_DTYPES
        }
        self._executors: dict[int, bytes] = {}

    def status(self) -> str | None:
        if self._library is None and self._unavailable is None:
            try:
                self._library = open_library(self._path)
                self._parallel_for = torch_parallel_for()
                if hasattr(os, "register_at_fork"):
                    os.register_at_fork(after_in_child=self._use_own_threads)
            except LibraryMissingError as error:
                self._unavailable = str(error)
        return self._unavailable

    def _use_own_threads(self) -> None:
        """In a forked child torch's pool has no threads left, and whoever asks it for some waits for ever."""
        self._parallel_for = 0
        self._executors.clear()

    def details(self) -> list[str]:
        if self.status() is not None:
            return []
        try:
            return [f"instruction set: {self.isa()}, of {', '.join(self.isas())}"]
        except FastattnError as error:
            return [f"instruction set: none, so every call is refused: {error}"]

    def supports(self, problem: AttentionProblem) -> str | None:
        if problem.device.type != "cpu":
            return f"for tensors on the CPU, these are on {problem.device}"
        if problem.dtype not in abi.DTYPES:
            return f"computes float32, bfloat16 and float16, not {problem.dtype}"
        if problem.bias_dtype not in (None, *abi.DTYPES):
            return f"takes a bias in float32, bfloat16 or float16, not {problem.bias_dtype}"
        return None

    def kernel(self, problem: AttentionProblem) -> str:
        isa = self.isa()
        dtype = _dtype(problem)
        if dtype == abi.F32_BF16_PRODUCTS and isa.endswith("bf16"):
            return f"{isa}, with products in bfloat16 as float32_matmul_precision 'medium' allows"
        if dtype == abi.F32_SPLIT_PRODUCTS and isa == "amx_bf16":
            return f"{isa}, each fp32 number as two of bfloat16, as float32_matmul_precision 'high' allows"
        return isa

    def isa(self) -> str:
        """The instruction set in use; FastattnError, as a call raises, where FASTATTN_CPU_ISA names none."""
        isa = self._library.fastattn_cpu_isa().decode()
        if not isa:
            raise FastattnError(self._library.fastattn_last_error().decode())
        return isa

    def isas(self) -> list[str]:
        """Every instruction set that this library has and this machine runs."""
        return self._library.fastattn_cpu_isas().decode().split(",")

    def forward(
        self, problem: AttentionProblem, inputs: AttentionInputs, out: Tensor, lse: Tensor | None
    ) -> None:
        status = self._library.fastattn_cpu_forward(
            self._problem(problem, inputs), abi.forward_struct(out, lse), self._executor()
        )
        if status != abi.STATUS_OK:
            self._raise(status, problem, inputs)

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
        io = abi.backward_struct(out, dout, lse, dlse, gradients)
        status = self._library.fastattn_cpu_backward(self._problem(problem, inputs), io, self._executor())
        if status != abi.STATUS_OK:
            self._raise(status, problem, inputs)

    def hidden_dropout(
        self, x: Tensor, out: Tensor, dropout_p: float, seed: int, seqlen: int, cu_seqlens: Tensor | None
    ) -> None:
        """See `fastattn.frozen.dropout`; x and out are contiguous (rows, columns)."""
        io = abi.hidden_dropout_struct(x, out, dropout_p, seed, seqlen, cu_seqlens)
        self._hold(self._library.fastattn_cpu_hidden_dropout(io, self._executor()))

    def rotary(
        self, xs: Sequence[Tensor], outs: Sequence[Tensor], cos: Tensor, sin: Tensor, transposed: bool
    ) -> None:
        """See `fastattn.rotary`; all of unit last stride."""
        io = abi.rotary_struct(xs, outs, cos, sin, transposed)
        self._hold(self._library.fastattn_cpu_rotary(io, self._executor()))

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, gelu: bool, transposed: bool
    ) -> None:
        """See `fastattn.frozen.product`; x and out are (rows, features), all of unit last stride."""
        io = abi.linear_struct(x, weight, bias, out, gelu, transposed)
        self._hold(self._library.fastattn_cpu_linear(io, self._executor()))

    def dropout_mask(self, seed: int, dropout_p: float, shape: tuple[int, int, int, int]) -> Tensor:
        """What the library keeps under dropout: bool (batch, num_heads, seqlen_q, seqlen_k)."""
        keep = torch.empty(shape, dtype=torch.uint8)
        self._hold(self._library.fastattn_cpu_dropout_mask(seed, dropout_p, *shape, keep.data_ptr()))
        return keep.bool()

    def _problem(self, problem: AttentionProblem, inputs: AttentionInputs) -> bytes:
        dtype = _dtype(problem)
        fixed_parts = self._fixed_parts[dtype]
        fixed = fixed_parts.get(problem)
        if fixed is None:
            fixed = abi.fixed_part(problem, dtype)
            if len(fixed_parts) >= _CACHE_SIZE:
                fixed_parts.clear()
            fixed_parts[problem] = fixed
        return abi.problem_struct(fixed, problem, inputs)

    def _executor(self) -> bytes:
        num_threads = torch.get_num_threads()
        executor = self._executors.get(num_threads)
        if executor is None:
            executor = self._executors[num_threads] = abi.executor_struct(self._parallel_for, num_threads)
        return executor

    def _hold(self, status: int) -> None:
        """What no argument should have caused, as an exception."""
        if status != abi.STATUS_OK:
            raise FastattnError(self._library.fastattn_last_error().decode())

    def _raise(self, status: int, problem: AttentionProblem, inputs: AttentionInputs) -> None:
        """The library's refusal as an exception. What Python can't see beforehand is the offsets' values."""
        message = self._library.fastattn_last_error().decode()
        if status == abi.STATUS_INVALID_ARGUMENT and problem.packed:
            check_offsets("cu_seqlens_q", inputs.cu_seqlens_q, problem.total_q, problem.seqlen_q)
            check_offsets("cu_seqlens_k", inputs.cu_seqlens_k, problem.total_k, problem.seqlen_k)
        if status == abi.STATUS_UNSUPPORTED:
            raise UnsupportedError("the CPU library cannot compute this problem", {"cpu": message})
        if status == abi.STATUS_OUT_OF_MEMORY:
            raise MemoryError(message)
        raise FastattnError(f"the CPU library failed with status {status}: {message}")


def _dtype(problem: AttentionProblem) -> int:
    """As the library counts them: fp32 with what torch's setting, which its linears heed too, allows."""
    if problem.dtype is torch.float32:
        allowed = torch.get_float32_matmul_precision()
        if allowed == "medium":
            return abi.F32_BF16_PRODUCTS
        if allowed == "high" and problem.seqlen_k >= _SPLIT_SEQLEN and problem.head_dim >= _SPLIT_HEAD_DIM:
            return abi.F32_SPLIT_PRODUCTS
    return abi.DTYPES[problem.dtype]


backend = CpuBackend()
