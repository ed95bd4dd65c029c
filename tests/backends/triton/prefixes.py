"""prefix_attention on the Triton backend, for the interpreter and the simulator alike."""

import torch

import fastattn


def check(dtype: torch.dtype, tolerance: float) -> None:
    """Output, log-sum-exp and all gradients against float64 attention over prefix and keys in one piece."""
    shapes = ((2, 4, 10, 64), (2, 2, 40, 64), (2, 2, 40, 64), (1, 2, 33, 64), (1, 2, 33, 64))
    ours = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in ours]
    key_mask = torch.rand(2, 40) > 0.3
    key_mask[1] = False  # of one sequence, the prefix alone is seen
    found = fastattn.prefix_attention(*ours, key_mask=key_mask, return_lse=True, backend="triton")
    q, k, v, prefix_k, prefix_v = exact
    both = [torch.cat([p.expand(2, -1, -1, -1), x], 2) for p, x in ((prefix_k, k), (prefix_v, v))]
    mask = torch.cat([torch.ones(2, 33, dtype=torch.bool), key_mask], 1)
    expected = fastattn.attention(q, *both, key_mask=mask, return_lse=True, backend="reference")
    upstream = torch.randn_like(found[0])
    found += torch.autograd.grad(found[0], ours, upstream)
    expected += torch.autograd.grad(expected[0], exact, upstream.double())
    for a, b in zip(found, (x.detach() for x in expected), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
