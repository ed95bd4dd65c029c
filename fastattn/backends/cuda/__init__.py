"""The native CUDA backend: kernels in csrc/cuda, called through the C ABI of csrc/fastattn.h.

Its library is not part of a plain installation: `fastattn build-cuda` compiles it.
"""

from .backend import backend

__all__ = ["backend"]
