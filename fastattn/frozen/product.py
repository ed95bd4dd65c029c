"""fp32 products with a frozen weight on the CPU: the op fastattn::linear, bias and GELU inside.

A weight that does not train needs no gradient, so backward is the same product with the weight the other way
round, and nothing is saved but the weight itself.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from .. import dispatch
from ..errors import InvalidArgumentError
from ..ops import _library

# Below, the call's own cost outweighs the gain.
FEWEST_ROWS = 256
MULTIPLE = 16  # of out_features, as the kernel stores whole vectors

_library.define("linear(Tensor x, Tensor weight, Tensor? bias, bool gelu, bool transposed) -> Tensor")
_op = torch.ops.fastattn.linear.default


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False, transposed: bool = False
) -> Tensor:
    """x·Wᵀ + b as nn.Linear has it, or x·W + b; then GELU, by erf. Differentiable in x, unless through GELU.

    Args:
        x: (..., in_features), fp32, on the CPU.
        weight: (out_features, in_features), or (in_features, out_features) if transposed; fp32, its last
            dimension contiguous, out_features a multiple of 16. A constant, as is
        bias: (out_features), fp32, contiguous.

    Returns:
        (..., out_features)

    Raises:
        InvalidArgumentError: shapes, dtypes or devices other than these; a weight or bias that trains.
    """
    return _op(x, weight, bias, gelu, transposed)


@functools.cache
def serves() -> bool:
    """Whether this machine has kernels that are faster than torch's product and GELU after it."""
    return _isa().startswith(("avx2", "avx512", "amx"))


@functools.cache
def beats_torch() -> bool:
    """Whether they are faster without GELU too: MKL, torch's fp32 product, keeps AVX-512 for Intel's own."""
    return serves() and _vendor() != "GenuineIntel"


def _isa() -> str:
    loaded = dispatch.load("cpu")
    return "" if isinstance(loaded, str) else loaded.isa()


def _vendor() -> str:
    """Of the processor, as Linux gives it; elsewhere unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> int:
    """out_features."""
    if x.dtype is not torch.float32 or x.dim() == 0:
        raise InvalidArgumentError("x", f"{x.dtype} {tuple(x.shape)}", "(..., in_features) in float32")
    if weight.dim() != 2 or weight.dtype is not torch.float32 or weight.shape[not transposed] != x.shape[-1]:
        shape = f"({x.shape[-1]}, out_features)" if transposed else f"(out_features, {x.shape[-1]})"
        raise InvalidArgumentError("weight", f"{weight.dtype} {tuple(weight.shape)}", f"{shape} in float32")
    out_features = weight.shape[transposed]
    if out_features % MULTIPLE or not out_features or not x.shape[-1]:
        raise InvalidArgumentError("weight", tuple(weight.shape), f"out_features a multiple of {MULTIPLE}")
    if bias is not None and (bias.dtype is not torch.float32 or bias.shape != (out_features,)):
        raise InvalidArgumentError(
            "bias", f"{bias.dtype} {tuple(bias.shape)}", f"({out_features}) in float32"
        )
    return out_features


def _kernel(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, transposed: bool) -> Tensor:
    out_features = _check(x, weight, bias, transposed)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = x.new_empty(rows.shape[0], out_features)
    bias = None if bias is None else bias.contiguous()
    dispatch.load("cpu").linear(rows, weight.contiguous(), bias, out, gelu, transposed)
    return out.view(*x.shape[:-1], out_features)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, transposed: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], _check(x, weight, bias, transposed))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, gelu, transposed):
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.requires_grad:
                raise InvalidArgumentError(name, "one that requires a gradient", "a frozen one")
        if gelu and x.requires_grad:
            raise InvalidArgumentError("gelu", True, "False where x requires a gradient")
        ctx.save_for_backward(weight)
        ctx.transposed = transposed
        with torch._C._AutoDispatchBelowAutograd():
            return _op(x, weight, bias, gelu, transposed)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return _op(grad, weight, None, False, not ctx.transposed), None, None, None, None


_library.impl("linear", _kernel, "CPU")
_library.impl("linear", _Product.apply, "Autograd")
torch.library.register_fake("fastattn::linear", _fake, lib=_library)
