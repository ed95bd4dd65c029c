"""The dropout stream of every backend, in plain torch integers.

Philox4x32-7 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011) with the
64-bit seed as key. One call serves eight keys of one query row:

    counter = (i, (j // 128) * 16 + j % 16, h, b)      slot = (j // 16) % 8
    drop <=> 16-bit half `slot` of the four words < round(dropout_p * 65536)

so whether a weight is dropped is a function of (seed, b, h, i, j) alone.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

_ROUNDS = 7
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def drop_threshold(dropout_p: float) -> int:
    """round(dropout_p * 65536), halves up: a weight is dropped when its 16 random bits lie below this.

    The probability is rounded to float32 first, as it crosses the C ABI.
    """
    return math.floor(ctypes.c_float(dropout_p).value * 65536.0 + 0.5)


def keep_scale(dropout_p: float) -> float:
    """What kept weights are multiplied by: the inverse of the probability that is really used."""
    return 65536.0 / (65536 - drop_threshold(dropout_p))


def philox4x32(key: tuple[Tensor, Tensor], counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Seven rounds on 32-bit words held in int64 tensors; the words broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product wraps modulo 2^64, and both of its halves survive the sign.
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def keep_mask(
    seed: Tensor,
    dropout_p: float,
    *,
    batch: Tensor | int,
    num_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """(batch, num_heads, seqlen_q, seqlen_k) bool, True where dropout keeps.

    `seed` is a 0-d int64 tensor whose bits are the unsigned key. `batch` is the number of sequences, or an
    int64 tensor with the batch index of each (the packed layout asks for one sequence at a time).
    """

    def index(size: int, axis: int) -> Tensor:
        shape = [1, 1, 1, 1]
        shape[axis] = size
        return torch.arange(size, dtype=torch.int64, device=device).view(shape)

    b = batch.to(device).view(-1, 1, 1, 1) if isinstance(batch, Tensor) else index(batch, 0)
    h, i, j = index(num_heads, 1), index(seqlen_q, 2), index(seqlen_k, 3)
    seed = seed.to(device)
    key = (seed & _WORD, (seed >> 32) & _WORD)
    words = philox4x32(key, (i, (j // 128) * 16 + j % 16, h, b))

    slot = (j // 16) % 8
    word = torch.where(
        slot < 4, torch.where(slot < 2, words[0], words[1]), torch.where(slot < 6, words[2], words[3])
    )
    half = torch.where(slot % 2 == 0, word & 0xFFFF, word >> 16)
    return half >= drop_threshold(dropout_p)
