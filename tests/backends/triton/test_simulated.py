"""The PTX that would run on an A100 or an H100, executed instruction by instruction (tests/ptxsim).

Nothing but the machine is replaced: the op, the launch layer and the compiled kernels are the real ones.
Every run checks bounds, alignment, uninitialised reads and races between warps; results are held to the
float64 reference.
"""

import doubles
import oracle
import prefixes
import pytest
import torch
from ptxsim import why_no_triton
from simulated_cases import DEEP, QUICK, SLOW, TF32

import fastattn
from fastattn.backends.triton import configs

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


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", DEEP)
def test_deep_cases_turn_every_main_loop_five_times(name, arch):
    case = DEEP[name]
    ((queries, keys),) = case.lengths
    shape = (case.head_dim, case.head_dim, 2)
    forward, dq = configs.forward_config(arch, *shape), configs.dq_config(arch, *shape)
    dkdv = configs.dkdv_config(arch, *shape)
    unmasked = keys - queries if case.options.get("causal") else keys  # that the first query sees
    assert unmasked // (forward.block_n * (2 if forward.paired else 1)) >= 5
    assert unmasked // dq.block_n >= 5
    assert queries // dkdv.block_m >= 5


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_prefix(arch, simulate, poisoned):
    runs = simulate(arch)
    prefixes.check(torch.float16, 4e-3)
    assert kernels_of(runs).count("forward_kernel") == kernels_of(runs).count("dkdv_kernel") == 2


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_code_for_far_rows(arch, simulate, poisoned, monkeypatch):
    """Offsets in 64 bits, as for sequences that span 2**31 elements, on rows that are near."""
    monkeypatch.setattr(doubles.launch_module(), "far", lambda *_: True)
    runs = simulate(arch)
    oracle.check(QUICK["bf16-causal-gqa"], "triton")
    assert kernels_of(runs) == ["forward_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel"]


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
