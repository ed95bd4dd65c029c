"""The machine's roof: multiply-adds per second in registers, and bytes per second from memory."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Peak", "measure"]

# The compiler flags of each instruction set of the CPU library, as in csrc/CMakeLists.txt.
_AVX512 = ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]
FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": _AVX512,
    "avx512_bf16": [*_AVX512, "-mavx512bf16"],
    "amx_bf16": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "neon": ["-march=armv8-a"],
    "neon_bf16": ["-march=armv8.2-a+bf16"],
}


@dataclass(frozen=True)
class Peak:
    """FLOP/s by dtype and bytes/s of a copy, with `threads` threads; None: not measured, see `reason`."""

    isa: str
    threads: int
    float32: float | None
    bfloat16: float | None
    copy_bytes: float
    reason: str = ""
    float16: float | None = None
    """None: computed in float32, as on CPUs."""

    def flops(self, dtype: str) -> float | None:
        if dtype == "float16" and self.float16 is not None:
            return self.float16
        return self.bfloat16 if dtype == "bfloat16" else self.float32


def measure(isa: str, threads: int, seconds: float = 1.0) -> Peak:
    """Compiles peak.cpp for `isa`, an entry of FLAGS, and runs it. Without a compiler: the copy alone."""
    copy_bytes = _copy_bytes(seconds)
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    compiler = next((name for name in names if shutil.which(name)), None)
    if compiler is None or isa not in FLAGS:
        reason = "no C++ compiler" if compiler is None else f"no compiler flags are known for {isa}"
        return Peak(isa, threads, None, None, copy_bytes, reason)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "libpeak.so")
        source = Path(__file__).with_name("peak.cpp")
        command = [
            compiler,
            "-O3",
            "-std=c++17",
            "-ffp-contract=fast",
            "-shared",
            "-fPIC",
            "-pthread",
            *FLAGS[isa],
        ]
        done = subprocess.run([*command, str(source), "-o", str(library)], capture_output=True, text=True)
        if done.returncode != 0:
            return Peak(
                isa, threads, None, None, copy_bytes, f"{compiler} failed: {done.stderr.strip()[:200]}"
            )
        loaded = ctypes.CDLL(str(library))
        found = []
        for function in (loaded.fastattn_peak_fp32, loaded.fastattn_peak_bf16):
            function.restype, function.argtypes = ctypes.c_double, [ctypes.c_int, ctypes.c_double]
            found.append(function(threads, seconds))
    fp32, bf16 = found
    return Peak(isa, threads, fp32, max(fp32, bf16), copy_bytes)  # bf16 can always be computed in fp32


def _copy_bytes(seconds: float) -> float:
    """Read and written bytes per second of a copy that no cache holds."""
    source = torch.zeros(64 << 20, dtype=torch.float32)
    target = torch.empty_like(source)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best
