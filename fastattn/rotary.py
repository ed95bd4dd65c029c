"""Rotary positions of queries and keys: the op fastattn::rotary (Su et al., "RoFormer", arXiv:2104.09864).

In the convention of transformers' Llama family: element i of a head turns with element i + D_rot / 2, and
what lies behind D_rot stays. One pass over q and k, in fp32, rounded once. The op is linear, so its gradient
is its own transpose and needs nothing but the angles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch
from .backends import Backend
from .errors import InvalidArgumentError, UnsupportedError
from .ops import _library, _transformed, _unit_last_stride, _unwatched

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BACKEND_OF = {"cpu": "cpu", "cuda": "triton"}

_library.define("rotary(Tensor[] xs, Tensor cos, Tensor sin, bool transposed) -> Tensor[]")
_op = torch.ops.fastattn.rotary.default


def rotate(xs: Sequence[Tensor], cos: Tensor, sin: Tensor, transposed: bool = False) -> list[Tensor]:
    """q, or q and k, turned by their positions' angles. Differentiable in xs, any number of times.

    Args:
        xs: one or two of (B, H, N, D), with an H each; fp32, fp16 or bf16; D at most 256.
        cos, sin: (B, N, D_rot) or (1, N, D_rot), D_rot even, 2 to D; fp32 or the dtype of xs.
            Constants.
        transposed: multiply by the transpose, which for the usual angles (their halves alike) turns back.

    Returns:
        Tensors like xs.

    Raises:
        InvalidArgumentError: shapes, dtypes or devices other than these; cos or sin that need a gradient.
        UnsupportedError: the backend of that device is not on this machine.
    """
    if not xs[0].is_meta and _unwatched((*xs, cos, sin)):  # as in ops.py, past the dispatcher
        if torch.is_grad_enabled():
            _refuse_trained(cos, sin)
            if any(x.requires_grad for x in xs):
                return list(_apply_directly(cos, sin, transposed, *xs))
        return _kernel(xs, cos, sin, transposed)
    if _transformed():
        return list(_Rotary.apply(cos, sin, transposed, *xs))
    return _op(xs, cos, sin, transposed)


def _mismatch(xs: Sequence[Tensor], cos: Tensor, sin: Tensor) -> InvalidArgumentError | None:
    if len(xs) not in (1, 2):
        return InvalidArgumentError("xs", f"{len(xs)} tensors", "q, or q and k")
    q, k = xs[0], xs[-1]
    if q.dim() != 4 or q.shape[3] > 256:
        return InvalidArgumentError("q", f"of shape {tuple(q.shape)}", "(B, H, N, D), D at most 256")
    batch, _, seqlen, head_dim = q.shape
    if k.dim() != 4 or k.shape[0] != batch or k.shape[2:] != q.shape[2:]:
        return InvalidArgumentError(
            "k", f"of shape {tuple(k.shape)}", f"({batch}, H, {seqlen}, {head_dim}) as q has it"
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype:
        allowed = "float32, float16 or bfloat16, q and k alike"
        return InvalidArgumentError("q", f"{q.dtype}, k of {k.dtype}", allowed)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dim() != 3 or table.shape[0] not in (1, batch) or table.shape[1] != seqlen:
            allowed = f"({batch} or 1, {seqlen}, D_rot)"
            return InvalidArgumentError(name, f"of shape {tuple(table.shape)}", allowed)
        if table.dtype not in (q.dtype, torch.float32):
            return InvalidArgumentError(name, table.dtype, f"{q.dtype} or torch.float32")
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        return InvalidArgumentError(
            "sin", f"{sin.dtype} {tuple(sin.shape)}", f"{cos.dtype} {tuple(cos.shape)}"
        )
    if cos.shape[2] % 2 or not 2 <= cos.shape[2] <= head_dim:
        allowed = f"an even D_rot, 2 to D = {head_dim}"
        return InvalidArgumentError("cos", f"of shape {tuple(cos.shape)}", allowed)
    if not q.device == k.device == cos.device == sin.device:
        places = f"{k.device}, {cos.device} and {sin.device}"
        return InvalidArgumentError("k, cos and sin", f"on {places}", f"on q's {q.device}")
    return None


def _backend(device: torch.device) -> Backend:
    name = _BACKEND_OF.get(device.type)
    loaded = f"no backend is for {device.type} devices" if name is None else dispatch.load(name)
    if isinstance(loaded, str):
        raise UnsupportedError(f"no rotary positions on {device}", {name or "auto": loaded})
    return loaded


def _outputs(xs: Sequence[Tensor]) -> list[Tensor]:
    outs = [torch.empty_like(x) for x in xs]
    # Of an expanded x another dimension may have become the innermost.
    return [out if out.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)
            for x, out in zip(xs, outs, strict=True)]  # fmt: skip


def _kernel(xs: Sequence[Tensor], cos: Tensor, sin: Tensor, transposed: bool) -> list[Tensor]:
    if (error := _mismatch(xs, cos, sin)) is not None:
        raise error
    backend = _backend(xs[0].device)
    xs = [_unit_last_stride(x) for x in xs]
    outs = _outputs(xs)
    backend.rotary(xs, outs, _unit_last_stride(cos), _unit_last_stride(sin), transposed)
    return outs


def _fake(xs: Sequence[Tensor], cos: Tensor, sin: Tensor, transposed: bool) -> list[Tensor]:
    if (error := _mismatch(xs, cos, sin)) is not None:
        raise error
    return _outputs([_unit_last_stride(x) for x in xs])


class _Rotary(torch.autograd.Function):
    """Saves the angles; backward turns the gradients that are wanted and no other."""

    generate_vmap_rule = True

    @staticmethod
    def forward(cos, sin, transposed, *xs):
        if _unwatched((*xs, cos, sin)):
            return tuple(_kernel(xs, cos, sin, transposed))
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(_op(xs, cos, sin, transposed))

    @staticmethod
    def setup_context(ctx, inputs, output):
        cos, sin, ctx.transposed = inputs[:3]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx, *grads):
        needs = ctx.needs_input_grad[3:]
        wanted = [g if needed else None for g, needed in zip(grads, needs, strict=True)]
        some = [g for g in wanted if g is not None]
        turned = iter(rotate(some, *ctx.saved_tensors, not ctx.transposed) if some else ())
        return None, None, None, *(None if g is None else next(turned) for g in wanted)


# Function.apply without the part in Python that cares for functorch's transforms.
_apply_directly = super(torch.autograd.Function, _Rotary).apply


def _refuse_trained(cos: Tensor, sin: Tensor) -> None:
    if cos.requires_grad or sin.requires_grad:
        raise InvalidArgumentError("cos, sin", "requires_grad=True", "constants: detach() them")


def _autograd(keyset, xs, cos, sin, transposed):
    recording = torch.is_grad_enabled()
    if recording:
        _refuse_trained(cos, sin)
    if torch.autograd.forward_ad._current_level >= 0 or (recording and any(x.requires_grad for x in xs)):
        return list(_Rotary.apply(cos, sin, transposed, *xs))
    with torch._C._AutoDispatchBelowAutograd():
        return _op.redispatch(keyset & torch._C._after_autograd_keyset, xs, cos, sin, transposed)


def _batched(info, in_dims, xs, cos, sin, transposed):
    """vmap: its dimension joins the batch."""
    x_dims, *table_dims = in_dims[:3]

    def joined(x: Tensor, dim: int | None, batch: int) -> Tensor:
        x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.expand(-1, batch, *x.shape[2:]).flatten(0, 1)

    sizes = [
        x.shape[0] if dim is None else x.movedim(dim, 0).shape[1] for x, dim in zip(xs, x_dims, strict=True)
    ]
    tables = cos, sin
    if table_dims != [None, None] or cos.shape[0] > 1:
        tables = [joined(table, dim, sizes[0]) for table, dim in zip(tables, table_dims, strict=True)]
    whole = [joined(x, dim, size) for x, dim, size in zip(xs, x_dims, sizes, strict=True)]
    outs = _op(whole, *tables, transposed)
    return [out.unflatten(0, (info.batch_size, -1)) for out in outs], [0] * len(outs)


_library.impl("rotary", _kernel, "CompositeExplicitAutograd")
_library.impl("rotary", _autograd, "Autograd", with_keyset=True)
torch.library.register_fake("fastattn::rotary", _fake, lib=_library)
torch.library.register_vmap("fastattn::rotary", _batched, lib=_library)
