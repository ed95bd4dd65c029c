"""Frozen linear layers on CPUs with AMX, where no gradient passes: bias and GELU inside the product.

torch first writes the bias into the output, for the product to be added to it, and computes GELU in a pass of
its own; AMX's products are fast enough to notice both, fp32's to notice GELU. oneDNN adds the bias to the
accumulators, and GELU sees them before they are rounded. The weight is used as it lies, so no copy has to be
kept, counted or told of updates; docs/frozen.md has what prepacked copies would bring.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .classes import replace_classes, restore_classes

# Below, the call's own cost outweighs the gain.
FEWEST_ROWS = 1024


class Linear(nn.Linear):
    """nn.Linear as patch makes it, in place of its class: the same module with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or product_dtype(x) != torch.bfloat16 or not self.is_fused(x):
            return super().forward(x)
        return self.product(x)

    def is_fused(self, x: Tensor) -> bool:
        """Whether `product` takes this x. In fp32 that pays for GELU alone."""
        weight, bias = self.weight, self.bias
        if bias is None or type(x) is not Tensor or any(type(t) is not nn.Parameter for t in (weight, bias)):
            return False
        tensors = (x, weight, bias)
        # Not whether gradients are on: recompute runs layers again without.
        if any(t.requires_grad or t.device.type != "cpu" for t in tensors) or not weight.is_contiguous():
            return False
        if x.dim() == 0 or x.shape[-1] != self.in_features or x.numel() < FEWEST_ROWS * self.in_features:
            return False
        dtype = product_dtype(x)
        # Autocast casts what is not in double precision.
        dtypes = (torch.bfloat16, torch.float32) if torch.is_autocast_enabled("cpu") else (dtype,)
        if dtype not in (torch.bfloat16, torch.float32) or any(t.dtype not in dtypes for t in tensors):
            return False
        if dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium":
            return False  # torch's layers take such products in bf16
        transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        return not (transformed or torch.jit.is_tracing())

    def product(self, x: Tensor, epilogue: str = "none", algorithm: str = "") -> Tensor:
        """epilogue(x·W + b) in fp32 or bf16; "gelu" with algorithm "none" (by erf) or "tanh"."""
        dtype = product_dtype(x)
        x, weight, bias = (t.detach().to(dtype) for t in (x, self.weight, self.bias))
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, epilogue, [], algorithm)


def product_dtype(x: Tensor) -> torch.dtype:
    """Of a linear layer's product with x."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


@functools.cache
def gains() -> bool:
    """Whether this machine has AMX and this torch the operator: without AMX nothing was gained."""
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise") and amx()


def replace_linears(model: nn.Module) -> None:
    """Every plain nn.Linear with a bias in it works as above from now on, while it is frozen."""
    if gains():
        replace_classes(model, {nn.Linear: Linear}, lambda module: module.bias is not None)


def restore_linears(model: nn.Module) -> None:
    restore_classes(model, {nn.Linear: Linear})
