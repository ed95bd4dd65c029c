"""Turns a problem into the structs of csrc/fastattn.h and calls the library."""

from __future__ import annotations


class CpuBackend:
    """Not loaded yet: see `status`."""

    name = "cpu"

    def status(self) -> str | None:
        return "its native library is not built yet"


backend = CpuBackend()
