"""What a step costs: bytes saved for backward, resident memory, and the machine it ran on."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import platform
import resource
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

import fastattn
from fastattn import dispatch

__all__ = ["SavedBytes", "machine", "peak_rss", "reset_peak_rss", "rss", "versions"]

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class SavedBytes:
    """Counts what autograd saves for one backward, by unique storage: views and shared tensors count once.

    The weights themselves are not counted: they are there anyway.
    """

    def __init__(self, weights: Iterable[torch.Tensor]):
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in weights}
        self.counts = True
        """What is saved first while this is False counts as nothing."""

    @contextlib.contextmanager
    def counting(self) -> Iterator[SavedBytes]:
        """Around the forward pass."""
        storages: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._weights:
                storages.setdefault(storage.data_ptr(), storage.nbytes() if self.counts else 0)
            return tensor.detach()  # an output that its own node holds would never be freed without backward

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield self
        self.bytes = sum(storages.values())


def rss() -> int | None:
    """Bytes resident now, where Linux tells."""
    return _status("VmRSS")


def peak_rss() -> int:
    """The most bytes resident since the start, or since `reset_peak_rss`."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    # macOS counts in bytes, everyone else in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_rss() -> None:
    """Gives freed memory back and starts the peak anew (on Linux; elsewhere the peak goes on)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text("5")


def _status(key: str) -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)


def machine() -> dict:
    """The processor, the instruction sets that torch and the kernels use, cores, memory and system."""
    kernels = dispatch.load("cpu")
    return {
        "cpu": _cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "kernels": kernels if isinstance(kernels, str) else kernels.isa(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict:
    found = {"python": platform.python_version(), "fastattn": fastattn.__version__}
    for package in ("torch", "transformers", "peft", "scikit-learn"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
