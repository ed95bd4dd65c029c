"""ptxsim: executes NVIDIA PTX on the CPU with numpy, and reports races, stray accesses and hangs. See README.md."""

from .compile import compile_cuda, compile_triton, launch_triton, run_triton, why_no_nvcc, why_no_triton
from .errors import (
    Deadlock,
    LaunchError,
    MemoryFault,
    ParseError,
    PtxError,
    RaceFault,
    Timeout,
    UnsupportedInstruction,
)
from .launch import Struct, run_ptx
from .machine import Options
from .memory import In, Out
from .parser import parse
from .report import Report
from .tensormap import TensorMap

__all__ = [
    "Deadlock",
    "In",
    "LaunchError",
    "MemoryFault",
    "Options",
    "Out",
    "ParseError",
    "PtxError",
    "RaceFault",
    "Report",
    "Struct",
    "TensorMap",
    "Timeout",
    "UnsupportedInstruction",
    "compile_cuda",
    "compile_triton",
    "launch_triton",
    "parse",
    "run_ptx",
    "run_triton",
    "why_no_nvcc",
    "why_no_triton",
]
