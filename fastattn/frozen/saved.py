"""What stands in for a tensor that autograd saves: the tensor itself, or how to compute it again.

A `Kept` is a tensor in memory. A `Computed` is a function of other sources. What autograd holds is a `View`
of either, so a chain of functions ends at tensors that are kept anyway. Values that several views need, one
after the other, are computed once and dropped after the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import ChangedTensorError

Hooks = tuple[Callable, Callable]


class Kept:
    """A tensor in memory, or wherever the caller's own saved-tensor hooks (`outer`) put it."""

    __slots__ = ("__weakref__", "outer", "packed", "storage", "tensor", "version")

    def __init__(self, tensor: Tensor, outer: Hooks | None):
        # Detached: what a node of autograd's graph saves must not lead back to the node.
        self.tensor, self.version = tensor.detach(), tensor._version
        self.outer, self.packed = outer, None
        # So that no other storage gets this one's address once the tensor is elsewhere.
        self.storage = None if outer is None else StorageWeakRef(tensor.untyped_storage())

    def acquire(self) -> None:
        """Somebody's backward needs it."""
        if self.outer is not None and self.tensor is not None:
            self.packed, self.tensor = self.outer[0](self.tensor), None

    def value(self) -> Sequence[Tensor]:
        if self.tensor is None:
            return (self.outer[1](self.packed),)
        check_unchanged(self.tensor, self.version)
        return (self.tensor,)


class Computed:
    """`function` of other sources' tensors, which returns one or several.

    on_need is called when it turns out that backward will compute it.
    """

    __slots__ = ("_cached", "_left", "_uses", "function", "inputs", "on_need")

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        inputs: tuple[View, ...],
        on_need: Callable[[], None] | None = None,
    ):
        self.function, self.inputs, self.on_need = function, inputs, on_need
        self._uses = self._left = 0
        self._cached: Sequence[Tensor] | None = None

    def acquire(self) -> None:
        if self._uses == 0:
            for view in self.inputs:
                view.source.acquire()
            if self.on_need is not None:
                self.on_need()
        self._uses += 1
        self._left += 1

    def value(self) -> Sequence[Tensor]:
        result = self._cached
        if result is None:
            result = self._cached = self.function(*(view.get() for view in self.inputs))
        self._left -= 1
        if self._left == 0:
            # A second backward through the same graph starts over.
            self._cached, self._left = None, self._uses
        return result


class View:
    """The `index`-th tensor of a source, or a view of its memory."""

    __slots__ = ("geometry", "index", "source")

    def __init__(self, source: Kept | Computed, index: int = 0, geometry: tuple | None = None):
        self.source, self.index, self.geometry = source, index, geometry

    def get(self) -> Tensor:
        tensor = self.source.value()[self.index]
        if self.geometry is None or geometry_of(tensor) == self.geometry:
            return tensor
        return tensor.as_strided(*self.geometry)


def geometry_of(tensor: Tensor) -> tuple:
    """What as_strided takes."""
    return tensor.size(), tensor.stride(), tensor.storage_offset()


def check_unchanged(tensor: Tensor, version: int) -> None:
    """As autograd checks what it saves itself."""
    if tensor._version != version:
        raise ChangedTensorError(
            f"a tensor of shape {tuple(tensor.shape)} that backward needs was modified in place after "
            f"forward: it is at version {tensor._version}, expected {version}"
        )
