"""torch.library's fastattn::forward, backward and hidden_dropout, and the way past them; rotary.py and
frozen/product.py add one each.

A call through the dispatcher passes its layers from the top: autocast casts q, k and v; autograd records what
backward needs, and nothing when no gradient is wanted; the kernel layer describes the problem, allocates the
results and lets a backend fill them. The fake kernels are the same with nobody filling.

Twenty arguments cost the dispatcher several microseconds, more than a small problem's arithmetic. So
`attend`, which the public functions call, enters at the layer it needs when nothing could be watching the
dispatcher: no compiler, no transform, no mode, no autocast, no profiler, no subclass.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from . import dispatch
from .backends import Gradients
from .errors import InvalidArgumentError, UnsupportedError
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

DIFFERENTIABLE = ("q", "k", "v", "bias", "relative_bias")  # the order of `needs` and of Gradients


# ---- the kernel layer: what fills memory, and what only allocates it


def _empty_like(x: Tensor, last_dim: int) -> Tensor:
    """Uninitialised, of x's shape but for the last dimension, in the order of memory that x has.

    The transposed view of a (B, N, H, D) projection thus gets an output whose transpose back is contiguous.
    """
    if last_dim == x.shape[-1]:
        return torch.empty_like(x)
    if x.dim() == 4 and x.stride(1) < x.stride(2):
        batch, heads, rows, _ = x.shape
        strides = (rows * heads * last_dim, last_dim, heads * last_dim, 1)
        return x.new_empty_strided((batch, heads, rows, last_dim), strides)
    return x.new_empty((*x.shape[:-1], last_dim))


def _allocate_forward(problem: AttentionProblem, q: Tensor, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    out = (
        torch.empty_like(q) if problem.head_dim_v == problem.head_dim else _empty_like(q, problem.head_dim_v)
    )
    if not need_lse:
        return out, None
    # empty_strided is the cheapest of the factories that take a size.
    heads = problem.num_heads
    if problem.packed:
        size, strides = (heads, problem.total_q), (problem.total_q, 1)
    else:
        rows = problem.seqlen_q
        size, strides = (problem.batch, heads, rows), (heads * rows, rows, 1)
    return out, torch.empty_strided(size, strides, dtype=torch.float32, device=q.device)


def _allocate_backward(inputs: AttentionInputs, needs: list[bool]) -> Gradients:
    q, k, v, bias, relative_bias = _differentiable(inputs)
    return Gradients(
        dq=torch.empty_like(q) if needs[0] else None,
        dk=torch.empty_like(k) if needs[1] else None,
        dv=torch.empty_like(v) if needs[2] else None,
        dbias=bias.new_empty(bias.shape, dtype=torch.float32) if needs[3] else None,
        drelative_bias=relative_bias.new_empty(relative_bias.shape, dtype=torch.float32)
        if needs[4]
        else None,
    )


def _in_dtype_of_inputs(inputs: AttentionInputs, gradients: Gradients) -> list[Tensor]:
    """The gradients that exist, in the order of Gradients, the biases' in their own dtypes."""
    results = [gradient for gradient in gradients[:3] if gradient is not None]
    for gradient, bias in ((gradients.dbias, inputs.bias), (gradients.drelative_bias, inputs.relative_bias)):
        if gradient is not None:
            results.append(gradient.to(bias.dtype))
    return results


def _unit_last_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _for_backend(inputs: AttentionInputs) -> AttentionInputs:
    """The inputs as backends are promised them. Copies only what lies differently."""
    q, k, v, key_mask, bias, relative_bias, alibi_slopes = inputs[:7]
    if (
        q.stride()[-1] == k.stride()[-1] == v.stride()[-1] == 1  # stride(-1) takes twice as long
        and key_mask is relative_bias is alibi_slopes is None
    ):
        return inputs
    if key_mask is not None:
        key_mask = _unit_last_stride(key_mask)
    q, k, v = _unit_last_stride(q), _unit_last_stride(k), _unit_last_stride(v)
    return AttentionInputs(q, k, v, key_mask, bias, _fp32(relative_bias), _fp32(alibi_slopes), *inputs[7:])


def _compute_forward(
    inputs: AttentionInputs, options: tuple, backend_name: str, need_grad: bool, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    problem = describe(inputs, options, need_grad)
    backend = dispatch.choose(problem, backend_name)
    inputs = _for_backend(inputs)
    out, lse = _allocate_forward(problem, inputs.q, need_lse)
    backend.forward(problem, inputs, out, lse)
    return out, lse


def _compute_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    needs: list[bool],
    inputs: AttentionInputs,
    options: tuple,
    backend_name: str,
) -> list[Tensor]:
    problem = describe(inputs, options, True)
    backend = dispatch.choose(problem, backend_name)
    ready = _for_backend(inputs)
    gradients = _allocate_backward(ready, needs)
    dlse = None if dlse is None else dlse.contiguous()
    out, dout = _unit_last_stride(out), _unit_last_stride(dout)
    backend.backward(problem, ready, out, lse.contiguous(), dout, dlse, gradients)
    return _in_dtype_of_inputs(inputs, gradients)


def _no_lse(q: Tensor) -> Tensor:
    """Stands for the lse that nobody asked for: an op must return a tensor."""
    return q.new_empty((0,), dtype=torch.float32)


def _forward_kernel(*args):
    *args, backend_name, need_grad, need_lse = args
    inputs, options = AttentionInputs(*args[:_NUM_TENSORS]), tuple(args[_NUM_TENSORS:])
    out, lse = _compute_forward(inputs, options, backend_name, need_grad, need_lse)
    return out, _no_lse(out) if lse is None else lse


def _backward_kernel(dout, dlse, out, lse, needs, *args):
    *args, backend_name = args
    inputs, options = AttentionInputs(*args[:_NUM_TENSORS]), tuple(args[_NUM_TENSORS:])
    return _compute_backward(dout, dlse, out, lse, needs, inputs, options, backend_name)


def _forward_fake(*args):
    *args, _, need_grad, need_lse = args
    inputs, options = AttentionInputs(*args[:_NUM_TENSORS]), AttentionOptions(*args[_NUM_TENSORS:])
    problem = validate(inputs, options, need_grad)
    out, lse = _allocate_forward(problem, _unit_last_stride(inputs.q), need_lse)
    return out, _no_lse(out) if lse is None else lse


def _backward_fake(dout, dlse, out, lse, needs, *args):
    inputs = _for_backend(AttentionInputs(*args[:_NUM_TENSORS]))
    return _in_dtype_of_inputs(AttentionInputs(*args[:_NUM_TENSORS]), _allocate_backward(inputs, needs))


# ---- autograd


class _Attention(torch.autograd.Function):
    """Saves what shapes the scores, out and lse; backward asks for the gradients wanted and no other.

    Only what can have a gradient is an argument of its own: every further one costs time. `call` holds the
    AttentionInputs, the options, the backend's name and how to compute: see `_forward_autograd`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q, k, v, bias, relative_bias, call):
        inputs, options, backend_name, compute = call
        # As inputs._replace has it, in a third of the time.
        inputs = AttentionInputs(q, k, v, inputs.key_mask, bias, relative_bias, *inputs[6:])
        return compute(inputs, options, backend_name, True, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, bias, relative_bias, (others, options, backend_name, _) = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, q, k, v, bias, relative_bias, others.key_mask, *others[6:])
        ctx.call = options, backend_name

    @staticmethod
    def backward(ctx, dout, dlse):
        out, lse, q, k, v, bias, relative_bias, key_mask, *rest = ctx.saved_tensors
        inputs = AttentionInputs(q, k, v, key_mask, bias, relative_bias, *rest)
        options, backend_name = ctx.call
        needs = list(ctx.needs_input_grad[:5])
        if dout is None:
            dout = torch.zeros_like(out)
        if not torch.is_grad_enabled() and _unwatched(inputs) and _unwatched((dout, dlse)):
            computed = _compute_backward(dout, dlse, out, lse, needs, inputs, options, backend_name)
        else:
            # functorch wants to see the Function before the op, the dispatcher alone brings it by itself.
            op = functools.partial(_Gradients.apply, backward) if _transformed() else backward
            computed = op(dout, dlse, out, lse, needs, *inputs, *options, backend_name)
        computed = iter(computed)
        return *(next(computed) if needed else None for needed in needs), None


# Function.apply without the part in Python that cares for functorch's transforms.
_apply_directly = super(torch.autograd.Function, _Attention).apply


class _Gradients(torch.autograd.Function):
    """The backward op where somebody may differentiate it once more: refuses when it comes to that."""

    generate_vmap_rule = True

    @staticmethod
    def forward(compute, *args):
        return tuple(compute(*args))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise UnsupportedError("fastattn's attention has no second derivative")


def _transformed() -> bool:
    """Whether torch.func transforms the call, and no compiler has taken that over."""
    return torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()


def _below_autograd(op, keyset, args):
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _forward_autograd(keyset, *args):
    forward_mode = torch.autograd.forward_ad._current_level >= 0  # _Attention refuses it, having no jvp
    if not (forward_mode or (torch.is_grad_enabled() and _needs_grad(args))):
        return _below_autograd(forward, keyset, args)
    *problem_args, backend_name, _, _ = args
    inputs, options = AttentionInputs(*problem_args[:_NUM_TENSORS]), tuple(problem_args[_NUM_TENSORS:])
    if _transformed():
        raise UnsupportedError("torch.func transforms take fastattn.attention, not the op below it")

    def compute(inputs, options, *rest):
        return _below_autograd(forward, keyset, (*inputs, *options, *rest))

    return _Attention.apply(*_differentiable(inputs), (inputs, options, backend_name, compute))


def _backward_autograd(keyset, *args):
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return list(_Gradients.apply(lambda *args: _below_autograd(backward, keyset, args), *args))
    return _below_autograd(backward, keyset, args)


def _differentiable(inputs) -> tuple:
    q, k, v, _, bias, relative_bias = inputs[:6]
    return q, k, v, bias, relative_bias


def gradients_needed(inputs: AttentionInputs) -> tuple[bool, ...]:
    """Which of DIFFERENTIABLE would get a gradient if attention were called now."""
    recording = torch.is_grad_enabled()
    return tuple(recording and x is not None and x.requires_grad for x in _differentiable(inputs))


def _needs_grad(inputs) -> bool:
    q, k, v, _, bias, relative_bias = inputs[:6]
    return (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bias is not None and bias.requires_grad)
        or (relative_bias is not None and relative_bias.requires_grad)
    )


def check_alibi_slopes(slopes: Tensor) -> None:
    """Slopes are constants; a caller who trains them must not find out from a missing gradient."""
    if slopes.requires_grad and torch.is_grad_enabled():
        allowed = "slopes that need no gradient: detach() them"
        raise InvalidArgumentError("alibi_slopes", "requires_grad=True", allowed)


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


# ---- vmap


def _in_a_loop(op):
    """The op once for each element, and a warning: nobody should wait for that without knowing."""

    def batched(info, in_dims, *args):
        how = f"vmap calls {op.name()} {info.batch_size} times; the batch dimension of q, k and v is faster"
        warnings.warn(how, stacklevel=2)

        def of_one(i, x, dim):
            return x.select(dim, i) if isinstance(dim, int) else x

        results = [op(*map(functools.partial(of_one, i), args, in_dims)) for i in range(info.batch_size)]
        stacked = [torch.stack(of_all) for of_all in zip(*results, strict=True)]
        kind = type(results[0])
        return kind(stacked), kind([0] * len(stacked))

    return batched


# ---- dropout of hidden states: see frozen/dropout.py

_library.define(
    "hidden_dropout(Tensor x, Tensor seed, Tensor? cu_seqlens, int seqlen, float dropout_p) -> Tensor"
)
hidden_dropout = torch.ops.fastattn.hidden_dropout.default


def _hidden_dropout_kernel(
    x: Tensor, seed: Tensor, cu_seqlens: Tensor | None, seqlen: int, dropout_p: float
) -> Tensor:
    """(rows, columns) x; row r is position r % seqlen of sequence r // seqlen, or as int32 cu_seqlens say."""
    x = x.contiguous()
    out = torch.empty_like(x)
    dispatch.load("cpu").hidden_dropout(x, out, dropout_p, int(seed), seqlen, cu_seqlens)
    return out


class _HiddenDropout(torch.autograd.Function):
    """Linear in x, so its gradient is itself; what it saves is the seed."""

    @staticmethod
    def forward(ctx, x, call):
        ctx.call = call
        with torch._C._AutoDispatchBelowAutograd():
            return hidden_dropout(x, *call)

    @staticmethod
    def backward(ctx, dout):
        return hidden_dropout(dout, *ctx.call), None


_library.impl("hidden_dropout", _hidden_dropout_kernel, "CPU")
_library.impl("hidden_dropout", lambda x, *call: _HiddenDropout.apply(x, call), "Autograd")
torch.library.register_fake(
    "fastattn::hidden_dropout", lambda x, *call: torch.empty_like(x).contiguous(), lib=_library
)

_library.impl("forward", _forward_kernel, "CompositeExplicitAutograd")
_library.impl("backward", _backward_kernel, "CompositeExplicitAutograd")
torch.library.register_fake("fastattn::forward", _forward_fake, lib=_library)
torch.library.register_fake("fastattn::backward", _backward_fake, lib=_library)
_library.impl("forward", _forward_autograd, "Autograd", with_keyset=True)
_library.impl("backward", _backward_autograd, "Autograd", with_keyset=True)
torch.library.register_vmap("fastattn::forward", _in_a_loop(forward), lib=_library)
torch.library.register_vmap("fastattn::backward", _in_a_loop(backward), lib=_library)
_library.impl("forward", _forward_autocast("cpu"), "AutocastCPU")
_library.impl("forward", _forward_autocast("cuda"), "AutocastCUDA")


# ---- past the dispatcher

_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter, type(None)})
_WATCHERS = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._are_functorch_transforms_active,
    torch._C._is_any_autocast_enabled,
    torch._C._get_tracing_state,
    torch.autograd._profiler_enabled,
)


def _unwatched(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a call through the dispatcher would do nothing but arrive at the kernel."""
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level >= 0:
        return False
    for watcher in _WATCHERS:
        if watcher():
            return False
    return _PLAIN_TYPES.issuperset(map(type, tensors))


def _through_dispatcher(inputs, options, *rest):
    return forward(*inputs, *options, *rest)


def attend(
    inputs: AttentionInputs, options: tuple, backend_name: str, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """(out, lse); lse means something only where need_lse."""
    if inputs.q.is_meta or not _unwatched(inputs):
        if _transformed():
            return _Attention.apply(
                *_differentiable(inputs), (inputs, options, backend_name, _through_dispatcher)
            )
        return forward(*inputs, *options, backend_name, False, need_lse)
    if torch.is_grad_enabled() and _needs_grad(inputs):
        return _apply_directly(*_differentiable(inputs), (inputs, options, backend_name, _compute_forward))
    return _compute_forward(inputs, options, backend_name, False, need_lse)
