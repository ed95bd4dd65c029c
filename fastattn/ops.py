"""The only torch.library registrations: fastattn::forward and fastattn::backward.

A call passes the dispatcher's layers from the top: autocast casts q, k and v; autograd records what backward
needs, and nothing when no gradient is wanted; the kernel layer describes the problem, allocates the results
and lets a backend fill them. The fake kernels are the same with nobody filling. Low-level registrations,
because `torch.library.custom_op` alone costs more than a small problem's arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch
from .backends import Gradients
from .errors import InvalidArgumentError
from .problem import AttentionInputs, AttentionOptions, AttentionProblem, describe, validate

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor? bias, Tensor? relative_bias, "
    "Tensor? alibi_slopes, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seed"
)
_OPTIONS = (
    "bool causal, float softmax_scale, int window_left, int window_right, float softcap, float dropout_p, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k"
)
_NUM_TENSORS = len(AttentionInputs._fields)
_NUM_OPTIONS = len(AttentionOptions._fields)

_library = torch.library.Library("fastattn", "DEF")
_library.define(
    f"forward({_TENSORS}, {_OPTIONS}, str backend, bool need_grad, bool need_lse) -> (Tensor, Tensor)"
)
_library.define(
    "backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, bool[] needs, "
    f"{_TENSORS}, {_OPTIONS}, str backend) -> Tensor[]"
)
forward = torch.ops.fastattn.forward.default
backward = torch.ops.fastattn.backward.default

_DIFFERENTIABLE = ("q", "k", "v", "bias", "relative_bias")  # the order of `needs` and of Gradients
_DIFFERENTIABLE_AT = tuple(AttentionInputs._fields.index(name) for name in _DIFFERENTIABLE)


# ---- what both layers of kernels allocate


def _empty_like(x: Tensor, last_dim: int) -> Tensor:
    """Uninitialised, of x's shape but for the last dimension, in the order of memory that x has.

    The transposed view of a (B, N, H, D) projection thus gets an output whose transpose back is contiguous.
    """
    if x.dim() == 4 and x.stride(1) < x.stride(2):
        batch, heads, rows, _ = x.shape
        strides = (rows * heads * last_dim, last_dim, heads * last_dim, 1)
        return x.new_empty_strided((batch, heads, rows, last_dim), strides)
    return x.new_empty((*x.shape[:-1], last_dim))


def _allocate_forward(problem: AttentionProblem, q: Tensor, need_lse: bool) -> tuple[Tensor, Tensor]:
    out = _empty_like(q, problem.head_dim_v)
    if not need_lse:
        return out, q.new_empty((0,), dtype=torch.float32)
    rows = (problem.total_q,) if problem.packed else (problem.seqlen_q,)
    leading = () if problem.packed else (problem.batch,)
    return out, q.new_empty((*leading, problem.num_heads, *rows), dtype=torch.float32)


def _allocate_backward(inputs: AttentionInputs, needs: list[bool]) -> Gradients:
    q, k, v, bias, relative_bias = (inputs[at] for at in _DIFFERENTIABLE_AT)
    return Gradients(
        dq=_empty_like(q, q.shape[-1]) if needs[0] else None,
        dk=_empty_like(k, k.shape[-1]) if needs[1] else None,
        dv=_empty_like(v, v.shape[-1]) if needs[2] else None,
        dbias=bias.new_empty(bias.shape, dtype=torch.float32) if needs[3] else None,
        drelative_bias=relative_bias.new_empty(relative_bias.shape, dtype=torch.float32)
        if needs[4]
        else None,
    )


def _in_dtype_of_inputs(inputs: AttentionInputs, gradients: Gradients) -> list[Tensor]:
    """The gradients that exist, in the order of Gradients, the biases' in their own dtypes."""
    results = list(gradients[:3])
    for gradient, bias in zip(gradients[3:], (inputs.bias, inputs.relative_bias), strict=True):
        results.append(None if gradient is None else gradient.to(bias.dtype))
    return [gradient for gradient in results if gradient is not None]


# ---- the kernel layer


def _unit_last_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _for_backend(inputs: AttentionInputs) -> AttentionInputs:
    """The inputs as backends are promised them. Copies only what lies differently."""
    q, k, v = inputs[:3]
    if q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and inputs.key_mask is None is inputs.relative_bias:
        return (
            inputs
            if inputs.alibi_slopes is None
            else inputs._replace(alibi_slopes=_fp32(inputs.alibi_slopes))
        )
    key_mask = inputs.key_mask
    return inputs._replace(
        q=_unit_last_stride(q),
        k=_unit_last_stride(k),
        v=_unit_last_stride(v),
        key_mask=None if key_mask is None else _unit_last_stride(key_mask),
        relative_bias=_fp32(inputs.relative_bias),
        alibi_slopes=_fp32(inputs.alibi_slopes),
    )


def _forward_kernel(*args):
    *problem_args, backend_name, need_grad, need_lse = args
    inputs = AttentionInputs(*problem_args[:_NUM_TENSORS])
    problem = describe(inputs, tuple(problem_args[_NUM_TENSORS:]), need_grad)
    backend = dispatch.choose(problem, backend_name)
    inputs = _for_backend(inputs)
    out, lse = _allocate_forward(problem, inputs.q, need_lse)
    backend.forward(problem, inputs, out, lse if need_lse else None)
    return out, lse


def _backward_kernel(dout, dlse, out, lse, needs, *args):
    *problem_args, backend_name = args
    inputs = AttentionInputs(*problem_args[:_NUM_TENSORS])
    problem = describe(inputs, tuple(problem_args[_NUM_TENSORS:]), True)
    backend = dispatch.choose(problem, backend_name)
    gradients = _allocate_backward(inputs, needs)
    dlse = None if dlse is None else dlse.contiguous()
    backend.backward(
        problem,
        _for_backend(inputs),
        _unit_last_stride(out),
        lse.contiguous(),
        _unit_last_stride(dout),
        dlse,
        gradients,
    )
    return _in_dtype_of_inputs(inputs, gradients)


def _forward_fake(*args):
    *problem_args, _, need_grad, need_lse = args
    inputs = AttentionInputs(*problem_args[:_NUM_TENSORS])
    problem = validate(inputs, AttentionOptions(*problem_args[_NUM_TENSORS:]), need_grad)
    return _allocate_forward(problem, _unit_last_stride(inputs.q), need_lse)


def _backward_fake(dout, dlse, out, lse, needs, *args):
    inputs = AttentionInputs(*args[:_NUM_TENSORS])
    return _in_dtype_of_inputs(inputs, _allocate_backward(inputs, needs))


# ---- autograd


class _Attention(torch.autograd.Function):
    """Saves what shapes the scores, out and lse; backward asks for the gradients wanted and no other."""

    @staticmethod
    def forward(ctx, keyset, *args):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = forward.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, *args[:_NUM_TENSORS])
        ctx.options = args[_NUM_TENSORS : _NUM_TENSORS + _NUM_OPTIONS + 1]
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        out, lse, *tensors = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        wanted = ctx.needs_input_grad[1:]
        needs = [wanted[at] for at in _DIFFERENTIABLE_AT]
        computed = iter(backward(dout, dlse, out, lse, needs, *tensors, *ctx.options))
        gradients = [None] * (1 + len(wanted))
        for at, needed in zip(_DIFFERENTIABLE_AT, needs, strict=True):
            if needed:
                gradients[1 + at] = next(computed)
        return tuple(gradients)


def check_alibi_slopes(slopes: Tensor) -> None:
    """Slopes are constants; a caller who trains them must not find out from a missing gradient."""
    if slopes.requires_grad and torch.is_grad_enabled():
        allowed = "slopes that need no gradient: detach() them"
        raise InvalidArgumentError("alibi_slopes", "requires_grad=True", allowed)


def _forward_autograd(keyset, *args):
    alibi_slopes = args[6]
    if torch.is_grad_enabled():
        if alibi_slopes is not None:
            check_alibi_slopes(alibi_slopes)
        if any(args[at] is not None and args[at].requires_grad for at in _DIFFERENTIABLE_AT):
            *rest, _, _ = args
            return _Attention.apply(keyset, *rest, True, True)
    with torch._C._AutoDispatchBelowAutograd():
        return forward.redispatch(keyset & torch._C._after_autograd_keyset, *args)


# ---- autocast


def cast_for_autocast(device_type: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype, except float64, which autocast leaves alone everywhere."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _forward_autocast(device_type: str):
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))

    def kernel(q, k, v, *rest):
        q, k, v = cast_for_autocast(device_type, (q, k, v))
        with torch._C._ExcludeDispatchKeyGuard(key):
            return forward(q, k, v, *rest)

    return kernel


_library.impl("forward", _forward_kernel, "CompositeExplicitAutograd")
_library.impl("backward", _backward_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::forward", _forward_fake, lib=_library)
torch.library.register_fake("fastattn::backward", _backward_fake, lib=_library)
_library.impl("forward", _forward_autograd, "Autograd", with_keyset=True)
_library.impl("forward", _forward_autocast("cpu"), "AutocastCPU")
_library.impl("forward", _forward_autocast("cuda"), "AutocastCUDA")
