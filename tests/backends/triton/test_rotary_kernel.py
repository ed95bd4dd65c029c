"""The kernel that turns q and k: its PTX simulated through the op, and what it compiles to."""

import importlib
import re

import doubles
import fake_cuda
import pytest
import torch
from doubles import SimulatedKernel
from ptxsim import why_no_triton

from fastattn import dispatch, reference, rotary
from fastattn.backends.triton import sass
from fastattn.backends.triton.backend import TritonBackend
from fastattn.errors import UnsupportedError

pytestmark = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))


@pytest.fixture
def module(monkeypatch):
    """The kernel's module, which the op takes for CPU tensors; nothing stays prepared."""
    module = importlib.import_module("fastattn.backends.triton.rotary")
    monkeypatch.setitem(rotary._BACKEND_OF, "cpu", "triton")
    monkeypatch.setitem(dispatch._backends, "triton", TritonBackend())
    module._prepare.cache_clear()
    yield module
    module._prepare.cache_clear()


@pytest.fixture
def runs(request, module, monkeypatch):
    """The simulator's runs of the kernel as PTX of sm_80 or sm_90."""
    runs = []
    monkeypatch.setattr(module, "rotary_kernel", SimulatedKernel(module.rotary_kernel, request.param, runs))
    return runs


@pytest.mark.parametrize("runs", [80, 90], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "table_dtype", "dim", "rotary_dim"),
    [
        (torch.float16, torch.float16, 64, 64),
        (torch.bfloat16, torch.float32, 128, 128),
        (torch.float32, torch.float32, 80, 32),
        (torch.float16, torch.float32, 38, 34),
    ],
)
def test_turned_and_compiled(runs, dtype, table_dtype, dim, rotary_dim, poisoned):
    """Forward and backward."""
    q, k = (torch.randn(2, 37, heads, dim).to(dtype).transpose(1, 2).requires_grad_() for heads in (5, 2))
    cos, sin = torch.randn(2, 1, 37, rotary_dim).to(table_dtype)
    outs = rotary.rotate((q, k), cos, sin)
    upstream = [torch.randn_like(out) for out in outs]
    gradients = torch.autograd.grad(outs, (q, k), upstream)
    tolerance = torch.finfo(dtype).eps
    for found, of, transposed in ((outs, (q, k), False), (gradients, upstream, True)):
        for out, x in zip(found, of, strict=True):
            exact = reference.rotary(x.double(), cos.double(), sin.double(), transposed)
            torch.testing.assert_close(out.double(), exact, atol=4 * tolerance, rtol=tolerance)
    assert len(runs) == 2
    for _, compiled, _ in runs:
        accesses = re.findall(r"\b(?:ld|st)\.global[.\w]*", compiled.asm["ptx"])
        if dim == 38:  # rows do not begin at multiples of 16 bytes
            assert not any("v4" in access for access in accesses)
        else:
            assert set(accesses) == {"ld.global.v4.b32", "st.global.v4.b32"}
        used = sass.resources(compiled.asm["cubin"])
        assert used["stack"] == 0
        assert used["registers"] <= 128


@pytest.mark.skipif(fake_cuda.why_not() is not None, reason=str(fake_cuda.why_not()))
def test_a_prepared_launch_reads_where_the_tensors_are_now(fake, module, monkeypatch):
    """Past the JIT from the second launch on; other lengths, strides and tables compile nothing anew."""
    device = fake(80)
    jit = doubles.count_jit(module, "rotary_kernel", monkeypatch)

    def check(dtype, seqlen, transposed=False):
        q, k = (torch.randn(2, seqlen, heads, 64).to(dtype).transpose(1, 2) for heads in (5, 2))
        cos, sin = torch.randn(2, 1, seqlen, 64).to(dtype)
        tolerance = torch.finfo(dtype).eps
        for xs in ((q, k), (k,), (q, k[:, ::2])):
            for out, x in zip(rotary.rotate(xs, cos, sin, transposed), xs, strict=True):
                exact = reference.rotary(x.double(), cos.double(), sin.double(), transposed)
                torch.testing.assert_close(out.double(), exact, atol=4 * tolerance, rtol=tolerance)

    check(torch.float16, 37)
    check(torch.float16, 37)
    check(torch.float16, 20)
    assert jit == device.kernels == ["rotary_kernel"]
    check(torch.bfloat16, 37)  # as many bytes, another code
    check(torch.float16, 37, transposed=True)
    assert jit == device.kernels == ["rotary_kernel"] * 3


def test_gpus_take_triton_and_say_why_not(monkeypatch):
    assert rotary._BACKEND_OF["cuda"] == "triton"
    monkeypatch.setitem(dispatch._backends, "triton", "not installed")
    with pytest.raises(UnsupportedError) as refused:
        rotary._backend(torch.device("cuda:0"))
    assert refused.value.reasons == {"triton": "not installed"}
    with pytest.raises(UnsupportedError, match="xpu"):
        rotary._backend(torch.device("xpu"))
