"""Modules built on fastattn's attention."""

from .multi_head_attention import MultiHeadAttention

__all__ = ["MultiHeadAttention"]
