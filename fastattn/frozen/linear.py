"""Frozen linear layers on the CPU: bias and GELU inside the product.

torch first writes the bias into the output, for the product to be added to it, and computes GELU in a pass of
its own. In fp32 the project's own kernel does both on the sums while they are in cache (product.py). In bf16,
on CPUs with AMX and where no gradient passes, oneDNN does; its products are too fast for one of ours. The
weight is used as it lies, so no copy has to be kept, counted or told of updates; docs/frozen.md has what
prepacked copies would bring.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import product
from .classes import replace_classes, restore_classes

# In bf16; below, the call's own cost outweighs the gain.
FEWEST_ROWS = 1024


class Linear(nn.Linear):
    """nn.Linear as patch makes it, in place of its class: the same module with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x) if self.is_fused(x) else super().forward(x)

    def is_fused(self, x: Tensor, gelu: bool = False) -> bool:
        """Whether `product` takes this x and is faster."""
        tensors = [t for t in (x, self.weight, self.bias) if t is not None]
        if torch.compiler.is_compiling() or not _plain(*tensors):
            return False
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            return False
        dtype, autocast = product_dtype(x), torch.is_autocast_enabled("cpu")
        # Autocast casts what is not in double precision.
        dtypes = (torch.bfloat16, torch.float32) if autocast else (dtype,)
        if any(t.dtype not in dtypes for t in tensors):
            return False
        # Whether x may have a gradient, not whether gradients are on: recompute runs layers again without.
        if dtype == torch.float32:
            return not (autocast or (gelu and x.requires_grad)) and in_float32(x, self.weight, gelu)
        rows = x.numel() // max(1, self.in_features)
        bf16 = dtype == torch.bfloat16 and bf16_gains() and rows >= FEWEST_ROWS
        return bf16 and self.bias is not None and not x.requires_grad

    def product(self, x: Tensor, gelu: bool = False) -> Tensor:
        """x·W + b in fp32 or bf16, and GELU (by erf) of it."""
        dtype = product_dtype(x)
        if dtype == torch.float32:
            return product.product(x, self.weight, self.bias, gelu)
        x, weight, bias = (t.detach().to(dtype) for t in (x, self.weight, self.bias))
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")


def in_float32(x: Tensor, weight: Tensor, gelu: bool = False, transposed: bool = False) -> bool:
    """Whether `product.product` takes these, plain fp32 tensors that fit, and is faster than torch."""
    in_features = weight.shape[not transposed]
    # Of both, as backward has the weight the other way round.
    if x.numel() < product.FEWEST_ROWS * in_features or any(n % product.MULTIPLE for n in weight.shape):
        return False
    # In other settings torch's layers take such products in bf16.
    exact = torch.get_float32_matmul_precision() == "highest"
    return exact and (product.serves() if gelu else product.beats_torch())


def _plain(x: Tensor, *weights: Tensor) -> bool:
    """Frozen parameters and an x on the CPU, with nothing between this call and the kernel that looks on."""
    if type(x) is not Tensor or any(type(w) is not nn.Parameter or w.requires_grad for w in weights):
        return False
    if any(t.device.type != "cpu" for t in (x, *weights)) or not weights[0].is_contiguous():
        return False
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return not (transformed or torch.jit.is_tracing())


def product_dtype(x: Tensor) -> torch.dtype:
    """Of a linear layer's product with x."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


@functools.cache
def bf16_gains() -> bool:
    """Whether this machine has AMX and this torch the operator: without AMX nothing was gained."""
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise") and amx()


def replace_linears(model: nn.Module) -> None:
    """Every plain nn.Linear in it works as above from now on, while it is frozen."""
    if bf16_gains() or product.serves():
        replace_classes(model, {nn.Linear: Linear})


def restore_linears(model: nn.Module) -> None:
    restore_classes(model, {nn.Linear: Linear})
