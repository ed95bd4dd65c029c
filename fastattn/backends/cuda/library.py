"""Finds and loads the CUDA library, once. It needs neither a driver nor CUDA's libraries to load."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from ..cpu import abi
from ..cpu.library import LibraryMissingError

_NATIVE = Path(__file__).parents[2] / "_native"
_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
PATH = _NATIVE / f"libfastattn_cuda{_SUFFIX}"


def open_library(path: Path = PATH) -> ctypes.CDLL:
    """The library, its functions declared; LibraryMissingError says what to do otherwise."""
    if not path.exists():
        raise LibraryMissingError(
            f"{path.name} is not built; with nvcc at hand: fastattn build-cuda (the triton backend serves "
            "the same devices without it)"
        )
    try:
        library = ctypes.CDLL(str(path))
        version = library.fastattn_abi_version()
        forward, backward = library.fastattn_cuda_forward, library.fastattn_cuda_backward
        versions = library.fastattn_cuda_versions
        library.fastattn_cuda_forward_kernel.restype = ctypes.c_char_p
        library.fastattn_cuda_backward_kernels.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise LibraryMissingError(
            f"{path.name} does not load: {error}; to build it anew: fastattn build-cuda"
        ) from None
    if version != abi.ABI_VERSION:
        raise LibraryMissingError(
            f"{path.name} speaks ABI version {version}, this fastattn {abi.ABI_VERSION}: fastattn build-cuda"
        )
    library.fastattn_last_error.restype = ctypes.c_char_p
    library.fastattn_cuda_architectures.restype = ctypes.c_char_p
    size = ctypes.POINTER(ctypes.c_int64)
    number = ctypes.POINTER(ctypes.c_int32)
    library.fastattn_cuda_device.argtypes = [ctypes.c_int32, number, number]
    versions.argtypes = [number, number]
    library.fastattn_cuda_num_splits.argtypes = [ctypes.c_char_p, ctypes.c_int32]
    library.fastattn_cuda_forward_kernel.argtypes = [ctypes.c_char_p, ctypes.c_int32, ctypes.c_int32]
    library.fastattn_cuda_backward_kernels.argtypes = [ctypes.c_char_p, ctypes.c_int32]
    library.fastattn_cuda_forward_workspace.argtypes = [ctypes.c_char_p, ctypes.c_int32, size]
    library.fastattn_cuda_backward_workspace.argtypes = [ctypes.c_char_p, ctypes.c_char_p, size]
    forward.argtypes = backward.argtypes = [ctypes.c_char_p] * 3
    return library
