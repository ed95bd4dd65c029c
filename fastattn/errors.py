"""Every exception fastattn raises on purpose. Each is also the builtin a caller would expect to catch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "BackendUnavailableError",
    "ChangedTensorError",
    "FastattnError",
    "InvalidArgumentError",
    "MissingDependencyError",
    "UnsupportedError",
    "UnsupportedModelError",
]


class FastattnError(Exception):
    """Base of all errors raised by fastattn."""


class InvalidArgumentError(FastattnError, ValueError):
    """An argument is malformed. Carries the argument's name, its value, and what is allowed."""

    def __init__(self, argument: str, value: Any, allowed: str):
        self.argument, self.value, self.allowed = argument, value, allowed
        super().__init__(argument, value, allowed)

    def __str__(self) -> str:
        return f"{self.argument} is {self.value}; allowed: {self.allowed}"


class UnsupportedError(FastattnError, NotImplementedError):
    """The problem is well-formed, but no backend (or not the forced one) can compute it.

    `reasons` maps each backend that was asked to the sentence it refused with.
    """

    def __init__(self, what: str, reasons: Mapping[str, str] | None = None, remedy: str = ""):
        self.what, self.reasons, self.remedy = what, dict(reasons or {}), remedy
        super().__init__(what, self.reasons, remedy)

    def __str__(self) -> str:
        lines = [self.what, *(f"  {name}: {reason}" for name, reason in self.reasons.items())]
        return "\n".join([*lines, self.remedy] if self.remedy else lines)


class BackendUnavailableError(FastattnError, RuntimeError):
    """A backend that was asked for by name is not on this machine."""

    def __init__(self, backend: str, reason: str):
        self.backend, self.reason = backend, reason
        super().__init__(backend, reason)

    def __str__(self) -> str:
        return f"backend {self.backend!r} is not available: {self.reason}"


class ChangedTensorError(FastattnError, RuntimeError):
    """Something that backward computes again from was modified in place since forward."""


class MissingDependencyError(FastattnError, ImportError):
    """An optional package is needed for what was asked, and an extra installs it."""

    def __init__(self, package: str, extra: str):
        self.package, self.extra = package, extra
        super().__init__(f"this needs the package {package!r}: pip install 'fastattn[{extra}]'")

    def __reduce__(self):
        return type(self), (self.package, self.extra)


class UnsupportedModelError(FastattnError, TypeError):
    """A model that fastattn cannot patch without changing what it computes."""
