"""The PTX that would run on an A100 or an H100, executed instruction by instruction (tests/ptxsim).

Nothing but the machine is replaced: the op, the launch layer and the compiled kernels are the real ones.
Every run checks bounds, alignment, uninitialised reads and races between warps; results are held to the
float64 reference.
"""

import importlib

import oracle
import pytest
import torch
from oracle import Case
from ptxsim import compile_triton, launch_triton, why_no_triton

from fastattn import dispatch

pytestmark = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))

OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}


class SimulatedKernel:
    """Takes a kernel's place in launch.py: compiles for `arch` and runs the PTX on CPU tensors."""

    def __init__(self, kernel, arch, runs):
        self.kernel, self.arch, self.runs = kernel, arch, runs

    def __getitem__(self, grid):
        return lambda **arguments: self.run(grid, arguments)

    def run(self, grid, arguments):
        options = {name: arguments.pop(name) for name in OPTIONS & arguments.keys()}
        constexprs = {name: value for name, value in arguments.items() if name.isupper()}
        rest = {name: value for name, value in arguments.items() if not name.isupper()}
        # What a kernel doesn't take here is what another one of the same launch does.
        compiled = compile_triton(self.kernel, rest, self.arch, constexprs=constexprs, **options)
        report = launch_triton(compiled, rest, grid=grid)
        self.runs.append((self.kernel.fn.__name__, compiled, report))


@pytest.fixture
def simulate(monkeypatch):
    """simulate(arch) makes backend="triton" run on CPU tensors in the simulator.

    Gives the list of its runs.
    """

    def install(arch):
        launch = importlib.import_module("fastattn.backends.triton.launch")
        module = importlib.import_module("fastattn.backends.triton.backend")
        runs = []
        for name in (
            "forward_kernel",
            "merge_kernel",
            "delta_kernel",
            "dq_kernel",
            "dkdv_kernel",
            "dbias_kernel",
            "join_diagonals_kernel",
        ):
            monkeypatch.setattr(launch, name, SimulatedKernel(getattr(launch, name), arch, runs))
        backend = module.TritonBackend()
        monkeypatch.setattr(module, "interpreting", lambda: True)
        monkeypatch.setattr(backend, "_device", lambda device: (arch, 4))
        monkeypatch.setattr(backend, "_status", None)
        monkeypatch.setattr(backend, "_asked", True)
        monkeypatch.setitem(dispatch._backends, "triton", backend)
        monkeypatch.setattr(dispatch, "_chosen", {})
        launch.forget()
        return runs

    yield install
    importlib.import_module("fastattn.backends.triton.launch").forget()


def kernels_of(runs):
    return [name for name, _, _ in runs]


def case(dtype=torch.float16, lengths=((70, 83),), **fields):
    return Case(dtype=dtype, lengths=lengths, kv_heads=1, head_dim=64, head_dim_v=64, **fields)


QUICK = {
    "fp16-plain": case(),
    "bf16-causal-gqa": case(torch.bfloat16, options={"causal": True}, group=2),
}
SLOW = {
    "key_mask": case(mask=0.3),
    "window": case(lengths=((90, 150),), options={"window": (33, 5)}),
    "bias": case(bias=(True, True, True, True), wanted=("q", "k", "v", "bias")),
    "relative_bias": case(relative_bias=True, wanted=("q", "k", "v", "relative_bias")),
    "alibi-softcap": case(alibi="heads", options={"softcap": 5.0}),
    "dropout": case(lengths=((40, 150),), options={"dropout_p": 0.3, "seed": 12345678912345}),
    "packed": case(lengths=((70, 83), (0, 3), (5, 0), (33, 20)), packed=True, options={"causal": True}),
    "dlse": case(use_lse=True),
    "decode": case(lengths=((1, 1100),), group=4, wanted=()),
    "wide": Case(
        torch.float16, ((70, 83),), kv_heads=1, head_dim=128, head_dim_v=128, options={"causal": True}
    ),
    "odd-dims": Case(torch.float16, ((35, 40),), kv_heads=1, head_dim=40, head_dim_v=96),
    "misaligned": case(lengths=((35, 40),), layout="sliced"),
    "fp32": case(torch.float32, lengths=((35, 40),)),
}  # fmt: skip


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
