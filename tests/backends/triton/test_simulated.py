"""The PTX that would run on an A100 or an H100, executed instruction by instruction (tests/ptxsim).

Nothing but the machine is replaced: the op, the launch layer and the compiled kernels are the real ones.
Every run checks bounds, alignment, uninitialised reads and races between warps; results are held to the
float64 reference.
"""

import importlib

import oracle
import pytest
from ptxsim import compile_triton, launch_triton, why_no_triton
from simulated_cases import QUICK, SLOW

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
