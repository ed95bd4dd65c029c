"""fastattn and its peers, each a function of the same inputs; or the reason why it cannot take part."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

import fastattn
from fastattn.dispatch import BACKEND_NAMES

from .grid import Inputs

__all__ = ["CONTENDERS", "Refusal", "make"]

LARGEST_EAGER_BYTES = 4 << 30  # of one matrix of scores; eager attention holds several


class Refusal(Exception):
    """A contender cannot compute this cell; the message says why."""


def _fastattn(inputs: Inputs, backend: str) -> Callable[[], torch.Tensor]:
    causal = inputs.cell.mask == "causal"
    return lambda: fastattn.attention(
        inputs.q, inputs.k, inputs.v, causal=causal, key_mask=inputs.key_mask, backend=backend
    )


def _fastattn_by(backend: str, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """fastattn again, by another of its backends."""
    q, k, v = (x.detach().requires_grad_(inputs.with_backward) for x in (inputs.q, inputs.k, inputs.v))
    told = fastattn.explain(
        q, k, v, causal=inputs.cell.mask == "causal", key_mask=inputs.key_mask, backend=backend
    )
    if told.backend is None:
        raise Refusal(told.refused[backend])
    return _fastattn(inputs, backend)


def _sdpa(inputs: Inputs) -> Callable[[], torch.Tensor]:
    mask = None if inputs.key_mask is None else inputs.key_mask[:, None, None, :]
    causal = inputs.cell.mask == "causal"
    return lambda: F.scaled_dot_product_attention(
        inputs.q, inputs.k, inputs.v, attn_mask=mask, is_causal=causal
    )


def _eager(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """As transformers' eager attention: a matrix of scores, softmax in float32."""
    batch, heads, length, head_dim = inputs.cell.shape
    matrix = batch * heads * length**2 * 4
    if matrix > LARGEST_EAGER_BYTES:
        raise Refusal(f"its matrix of scores would have {matrix / 2**30:.0f} GiB")
    mask = None
    if inputs.cell.mask == "causal":
        visible = torch.ones(length, length, dtype=torch.bool, device=inputs.q.device).tril()
        mask = torch.zeros(length, length, device=inputs.q.device, dtype=inputs.q.dtype)
        mask.masked_fill_(~visible, torch.finfo(inputs.q.dtype).min)
    elif inputs.key_mask is not None:
        mask = torch.zeros(batch, 1, 1, length, device=inputs.q.device, dtype=inputs.q.dtype)
        mask.masked_fill_(~inputs.key_mask[:, None, None, :], torch.finfo(inputs.q.dtype).min)

    def run() -> torch.Tensor:
        scores = torch.matmul(inputs.q, inputs.k.transpose(2, 3)) / math.sqrt(head_dim)
        if mask is not None:
            scores = scores + mask
        return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(inputs.q.dtype), inputs.v)

    return run


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(inputs: Inputs) -> Callable[[], torch.Tensor]:
    if inputs.with_backward and inputs.q.device.type == "cpu":
        raise Refusal("FlexAttention has no backward pass on CPUs")
    from torch.nn.attention.flex_attention import create_block_mask

    batch, _, length, _ = inputs.cell.shape
    mask_mod = None
    if inputs.cell.mask == "causal":
        mask_mod = _causal
    elif inputs.key_mask is not None:
        key_mask = inputs.key_mask

        def mask_mod(b, h, i, j):
            return key_mask[b, j]

    blocks = None
    if mask_mod is not None:
        per_batch = batch if inputs.key_mask is not None else None
        blocks = create_block_mask(mask_mod, per_batch, None, length, length, device=inputs.q.device)
    torch._dynamo.reset()  # each shape is a program of its own
    run = functools.partial(_compiled_flex(), inputs.q, inputs.k, inputs.v, block_mask=blocks)
    try:
        with torch.no_grad():
            run()
    except Exception as error:  # a compiler that is missing or fails, in as many ways as there are compilers
        raise Refusal(f"torch.compile failed: {type(error).__name__}: {str(error).strip()[:200]}") from None
    return run


def _causal(b, h, i, j):
    return i >= j


_BACKENDS = tuple(name for name in BACKEND_NAMES if name != "auto")
CONTENDERS = ("fastattn", "sdpa", "eager", "flex", "sdpa-flash", "sdpa-cudnn", "flash-attn", *_BACKENDS)


def make(name: str, inputs: Inputs, backend: str) -> Callable[[], None]:
    """One step of a contender on a cell: forward, and backward where the cell has it. Raises Refusal."""
    from . import gpu

    build = {
        "fastattn": functools.partial(_fastattn, backend=backend),
        "sdpa": _sdpa,
        "eager": _eager,
        "flex": _flex,
        "sdpa-flash": functools.partial(gpu.sdpa_by, SDPBackend.FLASH_ATTENTION),
        "sdpa-cudnn": functools.partial(gpu.sdpa_by, SDPBackend.CUDNN_ATTENTION),
        "flash-attn": gpu.flash_attn,
    } | {name: functools.partial(_fastattn_by, name) for name in _BACKENDS}
    forward = build[name](inputs)
    if not inputs.with_backward:

        def step() -> None:
            with torch.no_grad():
                forward()

        return step
    leaves = (inputs.q, inputs.k, inputs.v)
    return lambda: torch.autograd.grad(forward(), leaves, inputs.dout) and None
