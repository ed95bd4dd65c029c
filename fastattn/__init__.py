"""Fused attention kernels for PyTorch: forward and backward, on CPUs and GPUs.

The names below are the whole public interface. Importing fastattn imports torch and nothing else: the
transformers integration loads when `patch` is first used.
"""

from . import errors
from .attention import attention, prefix_attention, varlen_attention
from .dispatch import backends
from .explain import Explanation, explain

__version__ = "0.1.0"

_LAZY = {
    "MultiHeadAttention": "fastattn.nn",
    "patch": "fastattn.hf",
    "patched": "fastattn.hf",
    "unpatch": "fastattn.hf",
}

__all__ = [
    "Explanation",
    "attention",
    "backends",
    "errors",
    "explain",
    "prefix_attention",
    "varlen_attention",
    *_LAZY,
]


def __getattr__(name: str):
    if name in _LAZY:
        import importlib

        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
