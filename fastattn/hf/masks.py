"""The mask function that transformers calls for attn_implementation="fastattn".

A mask that only says which keys are padding stays (B, Nk); causality is left to the kernel. Anything else
(chunks, prefixes, windows narrower than the keys, packed rows found from position_ids) becomes the (B, 1, Nq,
Nk) bool mask that transformers itself would use, which is exact and costs O(Nq Nk).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import masking_utils


def fastattn_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs,
) -> Tensor | None:
    """What attention needs beside causality: None, a (B, Nk) key mask, or a (B, 1, Nq, Nk) mask; True =
    attend.

    The arguments are those of transformers' masking_utils.sdpa_mask. A (B, Nk') mask with Nk' < kv_length
    means that no query sees a key beyond Nk': the rest of a static cache, which the attention function cuts
    off, so that the last query sees the last key as a bottom-right aligned causal kernel has it.
    """
    two_dimensional = attention_mask is None or attention_mask.dim() == 2
    if (
        two_dimensional
        and allow_is_bidirectional_skip
        and mask_function is masking_utils.bidirectional_mask_function
    ):
        return _key_mask(attention_mask, kv_offset, kv_length)
    # A window that is at least as wide as the keys hides none of them.
    causal = mask_function is masking_utils.causal_mask_function or (
        local_size is not None and kv_length + kv_offset <= local_size and _is_causal_window(mask_function)
    )
    if two_dimensional and allow_is_causal_skip and causal and isinstance(q_offset, int):
        seen = q_offset + q_length - kv_offset
        if 0 < seen <= kv_length:
            mask = _key_mask(attention_mask, kv_offset, seen)
            if mask is None and seen < kv_length:
                mask = torch.ones(batch_size, seen, dtype=torch.bool, device=device)
            return mask
    return masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        device=device,
        **kwargs,
    )


def _key_mask(attention_mask: Tensor | None, offset: int, length: int) -> Tensor | None:
    """Columns offset .. offset + length - 1 of the padding mask, as bool; None if they hide nothing."""
    if attention_mask is None:
        return None
    mask = masking_utils.prepare_padding_mask(attention_mask, length, offset)[:, offset : offset + length]
    mask = mask.to(torch.bool)
    # Looking costs nothing on a CPU; elsewhere it would stall the queue, and a mask of ones is right as well.
    if mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask


def _is_causal_window(mask_function: Callable) -> bool:
    """Whether this is sliding_window_causal_mask_function's product, which only its closure tells."""
    parts = _closure(mask_function, "mask_functions")
    if parts is None or len(parts) != 2:
        return False
    window, rest = parts
    return rest is masking_utils.causal_mask_function and _closure(window, "sliding_window") is not None


def _closure(function: Callable, name: str):
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or not cells or name not in code.co_freevars:
        return None
    return cells[code.co_freevars.index(name)].cell_contents
