"""The dropout stream of fastattn/philox.py inside a kernel."""

import triton
import triton.language as tl

_ROUNDS = tl.constexpr(7)


@triton.jit
def dropout_keep(seed, o_b, o_h, o_i, start_j, o_c, drop_below):
    """Which weights of a tile dropout keeps, as booleans broadcast from o_i and o_c.

    o_i: query indices, o_c: columns 0..BLOCK-1 of the tile whose first key is start_j, a multiple of BLOCK,
    and BLOCK a power of two ≥ 16. Keeping start_j and o_c apart shows the compiler that columns 16 apart
    share a counter: the seven rounds are written once per weight and run once per counter.
    """
    counter = (start_j // 128) * 16 + (o_c // 128) * 16 + o_c % 16
    slot = (start_j // 16 + o_c // 16) % 8
    o_i, counter = tl.broadcast(o_i, counter)
    b = tl.zeros_like(counter) + o_b
    h = tl.zeros_like(counter) + o_h
    r0, r1, r2, r3 = tl.philox(seed, o_i, counter, h, b, n_rounds=_ROUNDS)  # [BLOCK, BLOCK] each
    word = tl.where(slot < 4, tl.where(slot < 2, r0, r1), tl.where(slot < 6, r2, r3))
    half = tl.where(slot % 2 == 0, word & 0xFFFF, word >> 16)
    return half.to(tl.int32) >= drop_below
