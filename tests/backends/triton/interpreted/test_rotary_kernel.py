"""Rotary positions in the interpreter, against the reference."""

import pytest
import torch

from fastattn import reference
from fastattn.backends.triton.rotary import rotate


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("batch", "heads", "seqlen", "dim", "rotary_dim"),
    [(2, (5, 2), 70, 64, 64), (1, (4, 1), 33, 80, 80), (3, (1, 1), 7, 96, 34), (2, (9,), 20, 7, 2)],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_numbers(poisoned, dtype, batch, heads, seqlen, dim, rotary_dim, transposed):
    xs = [torch.randn(batch, seqlen, h, dim).to(dtype).transpose(1, 2) for h in heads]
    for table_batch, table_dtype in ((1, dtype), (batch, torch.float32)):
        cos, sin = torch.randn(2, table_batch, seqlen, rotary_dim).to(table_dtype)
        outs = [torch.empty_like(x) for x in xs]
        rotate(xs, outs, cos, sin, transposed)
        for x, out in zip(xs, outs, strict=True):
            exact = reference.rotary(x.double(), cos.double(), sin.double(), transposed)
            tolerance = torch.finfo(dtype).eps
            torch.testing.assert_close(out.double(), exact, atol=4 * tolerance, rtol=tolerance)


def test_strides_that_allow_no_wide_loads_and_nothing_to_do(poisoned):
    wide = torch.randn(2, 5, 3, 65)
    x, out = wide[..., :64].transpose(1, 2), torch.empty(2, 3, 5, 64)
    cos, sin = torch.randn(2, 1, 5, 70)[..., 3:67]
    rotate([x], [out], cos, sin, False)
    torch.testing.assert_close(out, reference.rotary(x, cos, sin))
    for empty in (x[:0], x[:, :, :0]):
        rotate([empty], [torch.empty_like(empty)], cos[:, : empty.shape[2]], sin[:, : empty.shape[2]], False)
