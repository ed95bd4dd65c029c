"""The kernels that leave padding out and put it back: simulated as PTX, and where patched models use them."""

import importlib

import doubles
import fake_cuda
import pytest
import torch
from doubles import SimulatedKernel
from ptxsim import why_no_triton

from fastattn.backends.triton import sass
from fastattn.hf import packing

pytestmark = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))


@pytest.fixture
def kernels(request, monkeypatch):
    """(rows.py with its kernels run by the simulator as PTX of sm_80 or sm_90, the list of their runs)."""
    module, runs = importlib.import_module("fastattn.backends.triton.rows"), []
    for name in ("unpad_kernel", "pad_kernel"):
        monkeypatch.setattr(module, name, SimulatedKernel(getattr(module, name), request.param, runs))
    return module, runs


@pytest.mark.parametrize("kernels", [80, 90], indirect=True)
@pytest.mark.parametrize(("dtype", "columns"), [(torch.float16, 264), (torch.float32, 7)])
def test_packed_and_padded_as_without_them(kernels, dtype, columns, monkeypatch, poisoned):
    """Through the layout of a batch, forward and backward."""
    mask = torch.tensor([[1] * 9 + [0] * 11, [0] * 20, [1] * 20, [1, 0] * 10]).bool()
    rows = mask.flatten().nonzero().squeeze(1)
    layout = packing.Layout(4, 20, rows, torch.tensor([0, 9, 9, 29, 39], dtype=torch.int32), 20, 0)
    hidden = torch.randn(4, 20, columns).to(dtype)
    packed_seed = torch.randn(1, len(rows), columns).to(dtype)
    padded_seed = torch.randn(4, 20, columns).to(dtype)
    results = []
    for used in (None, kernels[0]):
        monkeypatch.setattr(packing, "_kernels", lambda _, used=used: used)
        x = hidden.clone().requires_grad_()
        packed = layout.pack(x)
        y = packed.detach().requires_grad_()
        padded = layout.pad(y)
        packed.backward(packed_seed)
        padded.backward(padded_seed)
        results.append((packed, padded, x.grad, y.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    runs = kernels[1]
    assert [name for name, _, _ in runs] == ["unpad_kernel", "pad_kernel", "pad_kernel", "unpad_kernel"]
    for _, compiled, _ in runs:
        # 16 bytes at once where rows allow it.
        assert ("ld.global.v4.b32" in compiled.asm["ptx"]) == (columns == 264)
        assert ("st.global.v4.b32" in compiled.asm["ptx"]) == (columns == 264)
        assert sass.resources(compiled.asm["cubin"])["stack"] == 0


@pytest.mark.skipif(fake_cuda.why_not() is not None, reason=str(fake_cuda.why_not()))
def test_a_prepared_launch_is_of_the_dtype_and_reads_where_the_tensors_are_now(fake, monkeypatch):
    device = fake(80)
    rows = importlib.import_module("fastattn.backends.triton.rows")
    jit = doubles.count_jit(rows, "unpad_kernel", monkeypatch)
    kept = torch.tensor([0, 2, 5])
    for dtype in (torch.float16, torch.float16, torch.float32):
        matrix = torch.randn(6, 7).to(dtype)
        assert torch.equal(rows.unpad(matrix, kept), matrix[kept])
    assert jit == device.kernels == ["unpad_kernel"] * 2


def test_used_for_tensors_on_a_gpu_alone(monkeypatch):
    assert packing._kernels(torch.zeros(2, 2)) is None

    class OnGpu:
        is_cuda = True

    monkeypatch.setattr(packing, "load", lambda name: object())
    assert packing._kernels(OnGpu()) is importlib.import_module("fastattn.backends.triton.rows")
    monkeypatch.setattr(packing, "load", lambda name: "not installed")
    assert packing._kernels(OnGpu()) is None
