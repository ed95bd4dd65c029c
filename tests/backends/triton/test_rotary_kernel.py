"""The kernel that turns q and k: its PTX simulated through the op's own launch, and what it compiles to."""

import importlib

import pytest
import torch
from doubles import SimulatedKernel
from ptxsim import why_no_triton

from fastattn import reference
from fastattn.backends.triton import sass

pytestmark = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))


@pytest.fixture
def kernels(request, monkeypatch):
    """(rotary.py with its kernel run by the simulator as PTX of sm_80 or sm_90, the list of its runs)."""
    module, runs = importlib.import_module("fastattn.backends.triton.rotary"), []
    monkeypatch.setattr(module, "rotary_kernel", SimulatedKernel(module.rotary_kernel, request.param, runs))
    return module, runs


@pytest.mark.parametrize("kernels", [80, 90], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "table_dtype", "dim", "rotary_dim", "transposed"),
    [
        (torch.float16, torch.float16, 64, 64, False),
        (torch.bfloat16, torch.float32, 128, 128, True),
        (torch.float32, torch.float32, 80, 32, False),
        (torch.bfloat16, torch.bfloat16, 256, 256, False),
        (torch.float16, torch.float32, 38, 34, True),
    ],
)
def test_turned_and_compiled(kernels, dtype, table_dtype, dim, rotary_dim, transposed, poisoned):
    module, runs = kernels
    q, k = (torch.randn(2, 37, heads, dim).to(dtype).transpose(1, 2) for heads in (5, 2))
    cos, sin = torch.randn(2, 1, 37, rotary_dim).to(table_dtype)
    outs = [torch.empty_like(q), torch.empty_like(k)]
    module.rotate([q, k], outs, cos, sin, transposed)
    for x, out in zip((q, k), outs, strict=True):
        exact = reference.rotary(x.double(), cos.double(), sin.double(), transposed)
        tolerance = torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), exact, atol=4 * tolerance, rtol=tolerance)
    ((_, compiled, _),) = runs
    text = compiled.asm["ptx"]
    wide = dim != 38  # whose rows do not begin at multiples of 16 bytes
    assert ("ld.global.v4.b32" in text) == ("st.global.v4.b32" in text) == wide
    used = sass.resources(compiled.asm["cubin"])
    assert used["stack"] == 0
    assert used["registers"] <= 128
