"""Which backend computes a problem, and why the others don't."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from .backends import Backend, preference
from .errors import BackendUnavailableError, InvalidArgumentError, UnsupportedError
from .problem import AttentionProblem

# In the order "auto" tries them, each with the device it is for; no other is imported. Triton comes before
# CUDA C++ (no GPU has timed either yet, and the features of the first are proven more widely) but for what
# `preference` makes an exception of.
_DEVICE_OF = {"triton": "cuda", "cuda": "cuda", "cpu": "cpu"}
BACKEND_NAMES = ("auto", *_DEVICE_OF, "reference")

_backends: dict[str, Backend | str] = {}
_chosen: dict[tuple[AttentionProblem, str], Backend] = {}
_CACHE_SIZE = 4096


def check_name(backend: str) -> None:
    """Refuse a name that no backend has."""
    if backend not in BACKEND_NAMES:
        raise InvalidArgumentError("backend", repr(backend), ", ".join(map(repr, BACKEND_NAMES)))


def choose(problem: AttentionProblem, backend: str) -> Backend:
    """The backend named, or under "auto" the first that can serve; else an error with all reasons."""
    key = (problem, backend)
    chosen = _chosen.get(key)
    if chosen is None:
        chosen = _choose(problem, backend)
        if len(_chosen) >= _CACHE_SIZE:
            _chosen.clear()
        _chosen[key] = chosen
    return chosen


def _choose(problem: AttentionProblem, backend: str) -> Backend:
    if backend == "auto":
        candidate, refusals = survey(problem)
        if candidate is None:
            raise UnsupportedError(f"no backend can compute {summary(problem)}", refusals, _remedy(problem))
        return candidate
    check_name(backend)
    loaded = load(backend)
    if isinstance(loaded, str):
        raise BackendUnavailableError(backend, loaded)
    reason = loaded.supports(problem)
    if reason is not None:
        raise UnsupportedError(f"backend {backend!r} cannot compute {summary(problem)}", {backend: reason})
    return loaded


def survey(problem: AttentionProblem) -> tuple[Backend | None, dict[str, str]]:
    """The first backend that can serve, and why each of the others is not the one."""
    first, refusals = None, {}
    why_cuda_first = _why_cuda_first(problem)
    for name in sorted(_DEVICE_OF, key=lambda name: name != "cuda") if why_cuda_first else _DEVICE_OF:
        if problem.device.type != _DEVICE_OF[name]:
            refusals[name] = f"for tensors on a {_DEVICE_OF[name]} device, these are on {problem.device}"
            continue
        loaded = load(name)
        reason = loaded if isinstance(loaded, str) else loaded.supports(problem)
        if reason is not None:
            refusals[name] = reason
        elif first is None:
            first = loaded
        else:
            refusals[name] = f"able to, but {first.name} comes first"
            if first.name == "cuda":
                refusals[name] = f"able to, but cuda is {why_cuda_first}"
    return first, refusals


def _why_cuda_first(problem: AttentionProblem) -> str | None:
    if problem.device.type != "cuda" or isinstance(load("cuda"), str):
        return None
    return preference.cuda_first(problem, load("cuda").capability(problem.device))


def load(name: str) -> Backend | str:
    """The backend, or the reason it is not available here. Imports it when it is first asked for."""
    loaded = _backends.get(name)
    if loaded is None:
        loaded = _import(name)
        if not isinstance(loaded, str):
            loaded = loaded.status() or loaded
        _backends[name] = loaded
    return loaded


def _import(name: str) -> Backend | str:
    try:
        return importlib.import_module(f"fastattn.backends.{name}").backend
    except ModuleNotFoundError as error:
        if error.name == f"fastattn.backends.{name}":
            return "not part of this installation"
        return f"the package {error.name!r} is not installed"


def details(name: str) -> list[str]:
    """What a backend says of itself and the devices, also where it is not available."""
    loaded = load(name)
    if isinstance(loaded, str):
        loaded = _import(name)
    return [] if isinstance(loaded, str) else loaded.details()


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on this machine, and if not, why."""

    name: str
    available: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {'available' if self.available else 'not available: ' + self.reason}"


def backends() -> tuple[BackendStatus, ...]:
    """Each backend's status on this machine, in the order "auto" tries them; the reference comes last."""
    statuses = []
    for name in _DEVICE_OF:
        loaded = load(name)
        reason = loaded if isinstance(loaded, str) else ""
        statuses.append(BackendStatus(name, not reason, reason))
    return (*statuses, BackendStatus("reference", True, ""))


def summary(problem: AttentionProblem) -> str:
    """The problem in one line, for error messages."""
    layout = "packed" if problem.packed else "padded"
    return (
        f"{layout} attention of {problem.dtype} on {problem.device} (batch {problem.batch}, "
        f"heads {problem.num_heads}/{problem.num_kv_heads}, seqlen {problem.seqlen_q}/{problem.seqlen_k}, "
        f"head_dim {problem.head_dim}/{problem.head_dim_v})"
    )


def _remedy(problem: AttentionProblem) -> str:
    if problem.device.type == "cpu" and isinstance(load("cpu"), str):
        return (
            "Install fastattn with its native library, or ask for backend='reference' (slow, O(N^2) memory)."
        )
    return "backend='reference' computes every problem, slowly and in O(N^2) memory."
