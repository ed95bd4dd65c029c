"""Watches one forward pass: which tensors could be computed again, and which of them autograd saves.

Module hooks `offer` outputs together with the way to compute them again. Whatever autograd then saves comes
through `pack`: an offered tensor, or a view of one, is replaced by its recipe, anything else is kept. Offers
die with the tensors they are about, so nothing lives longer than it would without.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .saved import Computed, Kept, View, geometry_of


@dataclass(eq=False, slots=True)
class _Offer:
    storage: StorageWeakRef  # while it is held, no other storage can have the same address
    version: int
    dtype: torch.dtype
    source: Computed


class _Active(threading.local):
    recorders: tuple = ()


_active = _Active()


def current() -> Recorder | None:
    """The recorder that autograd's saved tensors go to in this thread."""
    return _active.recorders[-1] if _active.recorders else None


class Recorder:
    """One forward pass. `owner` is whatever opened it, and closes it again."""

    def __init__(self, owner: object):
        self.owner = owner
        self.running: list = []  # see recompute.py: modules between their hooks, innermost last
        self._offers: dict[int, _Offer] = {}
        self._kept: dict[tuple, weakref.ref[Kept]] = {}
        self._outer = None

    def open(self) -> None:
        self._outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        torch._C._autograd._push_saved_tensors_default_hooks(self.pack, View.get)
        _active.recorders = (*_active.recorders, self)

    def close(self) -> None:
        _active.recorders = _active.recorders[:-1]
        torch._C._autograd._pop_saved_tensors_default_hooks()

    def offer(
        self,
        output: Tensor,
        function: Callable[..., Sequence[Tensor]],
        *inputs: Tensor,
        on_need: Callable[[], None] | None = None,
    ) -> None:
        """`output` is the first tensor that `function` returns for `inputs`, now or later."""
        self._forget_the_dead()
        storage = output.untyped_storage()
        if not _plain(output) or self.knows(output) or any(storage._cdata == _address(x) for x in inputs):
            return  # handed through: nothing new is held
        source = Computed(function, tuple(self.view(x) for x in inputs), on_need)
        self._offers[storage._cdata] = _Offer(StorageWeakRef(storage), output._version, output.dtype, source)

    def knows(self, tensor: Tensor) -> bool:
        """Whether this tensor has been offered, and is still what it was."""
        return self._find(tensor) is not None

    def pack(self, tensor: Tensor) -> View:
        """What autograd holds instead of `tensor`."""
        view = self.running[-1].inner_view(tensor, self) if self.running else None
        view = view or self.view(tensor)
        view.source.acquire()
        return view

    def view(self, tensor: Tensor) -> View:
        offer = self._find(tensor)
        if offer is not None:
            return View(offer.source, 0, geometry_of(tensor))
        if not _plain(tensor):
            return View(Kept(tensor, self._outer))
        # The same tensor may be saved by one and the input of another; the caller's hooks see it once.
        key = (_address(tensor), tensor._version, tensor.dtype, geometry_of(tensor))
        reference = self._kept.get(key)
        kept = None if reference is None else reference()
        if kept is None:
            kept = Kept(tensor, self._outer)
            self._kept[key] = weakref.ref(kept)
        return View(kept)

    def _find(self, tensor: Tensor) -> _Offer | None:
        if not self._offers or not _plain(tensor):
            return None
        offer = self._offers.get(_address(tensor))
        if offer is None or offer.version != tensor._version or offer.dtype != tensor.dtype:
            return None
        return offer

    def _forget_the_dead(self) -> None:
        dead = [key for key, offer in self._offers.items() if offer.storage.expired()]
        for key in dead:
            del self._offers[key]


def _plain(tensor: Tensor) -> bool:
    """Not a parameter, which is there anyway, nor anything whose memory is not simply its own."""
    return type(tensor) is Tensor and tensor.layout == torch.strided


def _address(tensor: Tensor) -> int:
    """Of the memory that views share; not reused while anybody holds a StorageWeakRef."""
    return tensor.untyped_storage()._cdata
