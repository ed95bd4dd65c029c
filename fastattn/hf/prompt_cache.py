"""A key/value cache behind a shared prompt: it counts the prompt's tokens and holds none of them.

transformers asks a cache how many tokens lie before the new ones (for positions and masks) and gets an
answer that counts the prompt. The keys it hands to attention are the sequences' own; the prompt's reach
attention by a `PromptPass`, which EnterDecoder makes from this cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .prompt_attention import PromptPass


class PromptLayer(DynamicLayer):
    """One layer's own keys and values, (B, Hkv, N, D), counted from the prompt's length on."""

    def __init__(self, prompt_length: int):
        super().__init__()
        self.prompt_length = prompt_length

    def get_seq_length(self) -> int:
        return self.prompt_length + super().get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return super().get_seq_length() + query_length, self.prompt_length

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.is_initialized:
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            super().batch_select_indices(indices)


class PromptCache(Cache):
    """What `generate` fills behind a prompt of these keys and values, one (1, Hkv, P, D) a layer."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]):
        super().__init__(layers=[PromptLayer(key.shape[2]) for key in keys])
        self.prompt_keys, self.prompt_values = keys, values

    def prompt_pass(self) -> PromptPass:
        return PromptPass(self.prompt_keys, self.prompt_values)
