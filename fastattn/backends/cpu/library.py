"""Finds and loads the native library, once, and checks that it speaks our ABI."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from . import abi

_NATIVE = Path(__file__).parents[2] / "_native"
_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
PATH = _NATIVE / f"libfastattn_cpu{_SUFFIX}"


class LibraryMissingError(Exception):
    """The library can't be used here; the message says why and what to do."""


def open_library(path: Path = PATH) -> ctypes.CDLL:
    """The library, its functions declared; LibraryMissingError says what to do otherwise."""
    if not path.exists():
        note = path.with_name("SKIPPED")  # setup.py leaves it where it was asked to leave the library out
        reason = note.read_text(encoding="utf-8").strip() if note.exists() else f"{path.name} is missing."
        raise LibraryMissingError(
            f"{reason} With a C++ compiler at hand: pip install --force-reinstall fastattn"
        )
    try:
        library = ctypes.CDLL(str(path))
        version = library.fastattn_abi_version()
        library.fastattn_cpu_hidden_dropout.argtypes = [ctypes.c_char_p] * 2
        library.fastattn_cpu_rotary.argtypes = [ctypes.c_char_p] * 2
        library.fastattn_cpu_linear.argtypes = [ctypes.c_char_p] * 2
    except (OSError, AttributeError) as error:
        raise LibraryMissingError(f"{path.name} does not load: {error}") from None
    if version != abi.ABI_VERSION:
        raise LibraryMissingError(
            f"{path.name} speaks ABI version {version}, this fastattn {abi.ABI_VERSION}: rebuild it"
        )
    library.fastattn_last_error.restype = ctypes.c_char_p
    library.fastattn_cpu_isa.restype = ctypes.c_char_p
    library.fastattn_cpu_isas.restype = ctypes.c_char_p
    for name in ("fastattn_cpu_forward", "fastattn_cpu_backward"):
        getattr(library, name).argtypes = [ctypes.c_char_p] * 3
    library.fastattn_cpu_dropout_mask.argtypes = [
        ctypes.c_uint64, ctypes.c_float, *[ctypes.c_int64] * 4, ctypes.c_void_p,
    ]  # fmt: skip
    return library


def torch_parallel_for() -> int:
    """Address of the C function that runs work on torch's threads; 0 in a torch without (before 2.10)."""
    # torch._C depends on libtorch_cpu, and a handle finds the symbols of what it depends on.
    try:
        function = ctypes.CDLL(torch._C.__file__).torch_parallel_for
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
