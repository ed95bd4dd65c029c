"""The native CPU backend: kernels in csrc/cpu, called through the C ABI of csrc/fastattn.h."""

from .backend import backend

__all__ = ["backend"]
