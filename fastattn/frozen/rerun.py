"""A module's forward once more, with the same precision, the same random numbers and the same weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .recorder import Recorder
from .saved import Computed, View, check_unchanged

# Modules whose forward draws random numbers while they train.
_DROPOUTS = (nn.Dropout, nn.AlphaDropout)


@dataclass(eq=False, slots=True)
class Rerun:
    """What one call of a module needs to be repeated."""

    module: nn.Module
    autocast: tuple | None  # device type, dtype
    rng: tuple | None  # the generators' states before the call
    weights: tuple[tuple[Tensor, int], ...]  # and their versions
    needs_grad: bool

    @classmethod
    def of(cls, module: nn.Module, x: Tensor) -> Rerun:
        """To be called before the module's forward."""
        device = x.device.type
        autocast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        rng = None
        if any(isinstance(m, _DROPOUTS) and m.training and m.p > 0 for m in module.modules()):
            rng = (torch.get_rng_state(), torch.cuda.get_rng_state(x.device) if x.is_cuda else None)
        weights = tuple((weight, weight._version) for weight in module.parameters())
        return cls(module, autocast, rng, weights, x.requires_grad)

    def output(self, x: Tensor) -> tuple[Tensor]:
        """What the module returned."""
        # A layer may take another way for an x that needs no gradient.
        x = x.detach().requires_grad_(self.needs_grad)
        with torch.no_grad(), self._as_before(x):
            return (self.module.forward(x),)

    def inner(self, x: Tensor) -> list[Tensor]:
        """What autograd saved while the module ran, in that order."""
        saved = []
        x = x.detach().requires_grad_(self.needs_grad)
        note = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.detach()), lambda _: None)
        with torch.enable_grad(), self._as_before(x), note:
            self.module.forward(x)
        return saved

    @contextlib.contextmanager
    def _as_before(self, x: Tensor) -> Iterator[None]:
        for weight, version in self.weights:
            check_unchanged(weight, version)
        with contextlib.ExitStack() as stack:
            # Backward's threads know nothing of forward's autocast.
            device = x.device.type
            if self.autocast is not None:
                stack.enter_context(torch.autocast(*self.autocast))
            elif torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
            if self.rng is not None:
                stack.enter_context(_random_numbers(self.rng, x.device))
            yield


@contextlib.contextmanager
def _random_numbers(states: tuple, device: torch.device) -> Iterator[None]:
    cpu, cuda = states
    now = torch.get_rng_state()
    cuda_now = None if cuda is None else torch.cuda.get_rng_state(device)
    try:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        yield
    finally:
        torch.set_rng_state(now)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda_now, device)


class Running:
    """One call of a module, from its pre-hook to its hook."""

    def __init__(self, module: nn.Module, x: Tensor, recorder: Recorder, replaces_inner: bool):
        self.module, self.rerun = module, Rerun.of(module, x)
        self._count = 0
        self._inner: Computed | None = None
        if replaces_inner:
            self._inner = Computed(self.rerun.inner, (recorder.view(x),))
            self._x, self._size = x.untyped_storage()._cdata, x.numel()

    def inner_view(self, tensor: Tensor, recorder: Recorder) -> View | None:
        """Stands for a tensor that only this call has made; None for one that is kept or known elsewhere."""
        at, self._count = self._count, self._count + 1
        if self._inner is None or isinstance(tensor, nn.Parameter):
            return None
        if 4 * tensor.numel() <= self._size:  # a norm's statistics are not worth a pass over its input
            return None
        if tensor.untyped_storage()._cdata == self._x or recorder.knows(tensor):
            return None
        return View(self._inner, at)
