"""What is wrong in Triton's interpreter and repaired by conftest.py.

A failure here says: the repair can go.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def product_kernel(p_x, p_y, p_z):
    o = tl.arange(0, 16)
    o_tile = o[:, None] * 16 + o[None, :]
    tl.store(p_z + o_tile, tl.dot(tl.load(p_x + o_tile), tl.load(p_y + o_tile)))


def product_error():
    x, y = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    z = torch.empty(16, 16)
    product_kernel[(1,)](x, y, z)
    return (z - x.float() @ y.float()).abs().max()


def test_bf16_dot_is_still_wrong_upstream(upstream_dot):
    assert product_error() > 1e3


def test_bf16_dot_is_right_when_repaired():
    assert product_error() < 1e-5
