"""What the Triton backend asks of torch, also inside of fastattn's ops."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import ops

# What reads a value back, or makes a result whose size depends on one: the host would wait for it.
WAITS = {
    "_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "repeat_interleave",
    "unique_dim", "_unique2", "bincount", "_is_all_true", "_is_any_true", "item",
}  # fmt: skip


class Watch(TorchDispatchMode):
    """names: of operations. allocated: (shape, dtype) of each result that is no view of an argument."""

    def __init__(self):
        super().__init__()
        self.names, self.allocated = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inside = {ops.forward: ops._forward_kernel, ops.backward: ops._backward_kernel}.get(function)
        if inside is not None:
            with self:
                return inside(*args)
        self.names.append(function.overloadpacket.__name__)
        found = function(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in args if torch.is_tensor(x)}
        for x in found if isinstance(found, tuple | list) else (found,):
            if torch.is_tensor(x) and x.untyped_storage()._cdata not in known:
                self.allocated.append((tuple(x.shape), x.dtype))
        return found
