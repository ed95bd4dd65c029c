"""The PTX that would run on an A100 or an H100, executed instruction by instruction (tests/ptxsim).

Nothing but the machine is replaced: the op, the launch layer and the compiled kernels are the real ones.
Every run checks bounds, alignment, uninitialised reads and races between warps; results are held to the
float64 reference.
"""

import oracle
import pytest
import torch
from ptxsim import why_no_triton
from simulated_cases import QUICK, SLOW, TF32

import fastattn

pytestmark = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))


def kernels_of(runs):
    return [name for name, _, _ in runs]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", QUICK)
def test_attention(name, arch, simulate, poisoned):
    runs = simulate(arch)
    oracle.check(QUICK[name], "triton")
    assert kernels_of(runs) == ["forward_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel"]
    matrix = "wgmma" if arch == 90 else "mma.sync"
    for kernel, compiled, _ in runs:
        if kernel != "delta_kernel":
            assert matrix in compiled.asm["ptx"], kernel


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", SLOW)
def test_feature(name, arch, simulate, poisoned):
    simulate(arch)
    oracle.check(SLOW[name], "triton")


@pytest.fixture
def tf32_allowed():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        pytest.param(arch, name, marks=[] if name == "plain" else pytest.mark.slow)
        for arch in (80, 90)
        for name in TF32
    ],
)
def test_tf32(arch, name, simulate, poisoned, tf32_allowed):
    """Numbers that float16 holds, and TF32 with as many bits, held to what is asked of float16."""
    runs = simulate(arch)
    oracle.check(TF32[name], "triton", given_as=torch.float32)
    for kernel, compiled, _ in runs:
        assert (".tf32" in compiled.asm["ptx"]) == (kernel not in ("delta_kernel", "merge_kernel"))


def test_float32_is_exact_unless_torch_allows_otherwise(simulate):
    runs = simulate(80)
    q = torch.randn(1, 1, 20, 16)
    fastattn.attention(q, q, q, backend="triton")
    ((_, compiled, _),) = runs
    assert ".tf32" not in compiled.asm["ptx"]
