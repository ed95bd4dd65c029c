"""LoRA on a frozen linear layer: x·W + b + s·(x·A)·B in the layer's own dtype, without a pass of its own.

peft computes A and B in their dtype, then scales and adds. For fp32 adapters of a bf16 backbone that makes
fp32 copies of x, of the output and of its gradient, in every adapted layer. Here A and B are cast instead, as
autocast does, s goes into B, and the last product adds to the first one's output. A's and B's gradients are
rounded to that dtype once, and come back in theirs.
"""

from __future__ import annotations

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from ..log import log_once
from . import linear, product
from .classes import replace_classes, restore_classes
from .recompute import is_watched


class Linear(lora.Linear):
    """peft's lora.Linear as patch makes it, in place of its class: the same module with another forward."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        compiled = torch.compiler.is_compiling() or torch.jit.is_tracing()
        name = None if compiled or args or kwargs else self._plain_adapter(x)
        if name is None:
            return super().forward(x, *args, **kwargs)
        base, a, b = self.base_layer, self.lora_A[name], self.lora_B[name]
        dropped = self.lora_dropout[name](x)
        return _Product.apply(x, dropped, base.weight, base.bias, a.weight, b.weight, self.scaling[name])

    def _plain_adapter(self, x: Tensor) -> str | None:
        """The one adapter at work, if it is nothing but A and B and nobody looks at what is between them."""
        if self.disable_adapters or self.merged or type(x) is not Tensor or x.device.type != "cpu":
            return None
        if torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active():
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        reason = self._obstacle(names, x)
        if reason is not None:
            log_once(f"LoRA on {type(self.base_layer).__name__} is computed as peft does: {reason}")
        return names[0] if names and reason is None else None

    def _obstacle(self, names: list[str], x: Tensor) -> str | None:
        if len(names) > 1:
            return "several adapters are active"
        if any(name in self.lora_variant for name in names):
            return "DoRA or another variant of it"
        base = self.base_layer
        adapter = [layers[name] for name in names for layers in (self.lora_A, self.lora_B)]
        if any(type(layer) not in (nn.Linear, linear.Linear) for layer in (base, *adapter)):
            return "a layer of another kind"
        if any(is_watched(layer) for layer in (base, *adapter)) or _has_any_global_hook():
            return "hooks inside it"
        if any(layer.bias is not None for layer in adapter):
            return "the adapter has a bias"
        if any(p.requires_grad for p in base.parameters()):
            return "the layer is trained"
        same_dtype = all(p.dtype == x.dtype for p in base.parameters())
        if x.dim() == 0 or x.shape[-1] != base.in_features or not same_dtype:
            return "its input does not fit"
        dtypes = (x.dtype, torch.float32) if x.dtype == torch.bfloat16 else (x.dtype,)
        weights = [layer.weight for layer in (base, *adapter)]
        if any(type(w) is not nn.Parameter or w.device != x.device or w.dtype not in dtypes for w in weights):
            return "weights in another dtype or form"
        return None


class _Product(torch.autograd.Function):
    """x and what dropout left of it (..., in), W (out, in), b (out,) or None, A (r, in), B (out, r), s."""

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, a, b, scaling) -> Tensor:
        rows = dropped.reshape(-1, dropped.shape[-1])
        low = rows @ a.to(x.dtype).t()
        out = _times(x.reshape(rows.shape), weight, bias)
        out.addmm_(low, (b * scaling).to(x.dtype).t())
        _, _, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if needs_a else None, low if needs_b else None, weight, a, b)
        ctx.shape, ctx.scaling, ctx.drops = x.shape, scaling, dropped is not x
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        rows, low, weight, a, b = ctx.saved_tensors
        needs_x, _, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        grad = grad.reshape(-1, grad.shape[-1])
        d_low = grad @ (b * ctx.scaling).to(grad.dtype)
        d_a = (d_low.t() @ rows).to(a.dtype) if needs_a else None
        d_b = (grad.t() @ low).to(b.dtype) * ctx.scaling if needs_b else None
        dx = d_dropped = None
        if needs_x:
            dx, a = _times(grad, weight, transposed=True).view(ctx.shape), a.to(grad.dtype)
            if ctx.drops:
                d_dropped = (d_low @ a).view(ctx.shape)
            else:
                dx.view(-1, dx.shape[-1]).addmm_(d_low, a)
        return dx, d_dropped, None, None, d_a, d_b, None


def _times(x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> Tensor:
    """x·Wᵀ + b, or x·W; `_plain_adapter` has seen to it that all are plain tensors."""
    if x.dtype == torch.float32 and linear.in_float32(x, weight, transposed=transposed):
        return product.product(x, weight, bias, transposed=transposed)
    return x @ weight if transposed else nn.functional.linear(x, weight, bias)


def replace_loras(model: nn.Module) -> None:
    """Every linear layer with LoRA in it works as above from now on, while that is all it has."""
    replace_classes(model, {lora.Linear: Linear})


def restore_loras(model: nn.Module) -> None:
    restore_classes(model, {lora.Linear: Linear})
