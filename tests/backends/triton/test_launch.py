"""The path from the op to cuLaunchKernelEx as on a GPU, with our own driver at its end (fake_cuda.py)."""

import importlib
import subprocess
import sys
from pathlib import Path

import doubles
import fake_cuda
import oracle
import pytest
import torch
from oracle import Case
from watch import WAITS, Watch

import fastattn
from fastattn.backends import Gradients

pytestmark = pytest.mark.skipif(fake_cuda.why_not() is not None, reason=str(fake_cuda.why_not()))


def case(dtype=torch.float16, lengths=((40, 83),), **fields):
    return Case(dtype=dtype, lengths=lengths, kv_heads=1, head_dim=64, head_dim_v=64, **fields)


QUICK = case(torch.bfloat16, group=2, options={"causal": True, "dropout_p": 0.3, "seed": 2**63 + 5})
SLOW = {
    "biases": case(
        bias=(True, True, True, True), relative_bias=True, alibi="heads", mask=0.2, use_lse=True,
        wanted=("q", "k", "v", "bias", "relative_bias"),
    ),
    "packed": case(lengths=((40, 43), (0, 3), (33, 20)), packed=True),
    "decode": case(lengths=((1, 1100),), group=4, wanted=()),
    "fp32": case(torch.float32, options={"window": (9, 4), "softcap": 5.0, "scale": -0.2}),
    "sliced": case(lengths=((35, 40),), layout="sliced"),
}  # fmt: skip


def test_arguments_arrive(fake, poisoned):
    device = fake(80)
    oracle.check(QUICK, "triton")
    names = [name for name, *_ in device.launches]
    assert names == ["forward_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", SLOW)
def test_arguments_of_every_feature_arrive(name, arch, fake, poisoned):
    fake(arch)
    oracle.check(SLOW[name], "triton")


def test_a_prepared_launch_reads_where_the_tensors_are_now(fake):
    """The second call is not the first one's addresses again, also where two of those were the same."""
    device = fake(80)
    q, k, v = (torch.randn(1, 1, 40, 64).half() for _ in range(3))
    shifted = torch.empty(40 * 64 + 1).half()[1:].view(1, 1, 40, 64).copy_(v)
    for tensors in ((q, q, q), (q, k, v), (k, q, q), (q, k, shifted)):
        out = fastattn.attention(*tensors, backend="triton")
        expected = fastattn.attention(*(x.double() for x in tensors), backend="reference")
        torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=1e-2)
    assert device.kernels == ["forward_kernel"] * 2  # v out of alignment needs narrower loads


def test_one_kernel_serves_every_length_stride_and_seed(fake):
    device = fake(80, simulate=False)
    for batch, heads, rows in ((1, 1, 16), (2, 3, 100), (1, 16, 65)):
        x = torch.randn(batch, rows, heads, 64).half()
        for q in (x.transpose(1, 2), x.transpose(1, 2).contiguous()):
            fastattn.attention(q, q, q, dropout_p=0.1, seed=2**64 - rows, backend="triton")
    assert device.kernels == ["forward_kernel"]


@pytest.fixture
def through_the_jit(monkeypatch):
    """The names of the kernels whose launches went through Triton's JIT."""
    launch, names = doubles.launch_module(), []
    for name in doubles.KERNELS:
        doubles.count_jit(launch, name, monkeypatch, names)
    return names


def test_a_growing_sequence_compiles_nothing_anew(fake, through_the_jit):
    """Decoding: the keys grow, and with them the number of shares that they are split into."""
    device = fake(80, simulate=False)
    q = torch.randn(1, 4, 1, 64).half()
    for rows in range(490, 3000, 45):
        k = torch.randn(1, 1, rows, 64).half()
        fastattn.attention(q, k, k, causal=True, backend="triton")
    # Not split while the keys are few; and one that writes parts, which are merged.
    assert device.kernels == ["forward_kernel", "forward_kernel", "merge_kernel"]
    assert through_the_jit == device.kernels


def test_packed_batches_of_any_total_compile_nothing_anew(fake, through_the_jit):
    device = fake(80, simulate=False)
    for rows in (40, 97, 130, 1025):
        q = torch.randn(rows, 1, 64).half().requires_grad_()
        offsets = torch.tensor([0, 30, rows], dtype=torch.int32)
        fastattn.varlen_attention(q, q, q, offsets, backend="triton").sum().backward()
    assert device.kernels == ["forward_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel"]
    assert through_the_jit == device.kernels


@pytest.mark.parametrize("arch", [80, 90])
def test_a_seed_drawn_on_the_device_stays_there(arch, fake, monkeypatch):
    """Dropout without a seed, forward and backward: the kernels read what torch drew."""
    device = fake(arch)
    monkeypatch.setattr(doubles.launch_module(), "_read_in_kernels", lambda seed: True)
    q, k, v = (torch.randn(1, 1, 40, 64).half().requires_grad_() for _ in range(3))
    with Watch() as seen:
        out = fastattn.attention(q, k, v, dropout_p=0.3, backend="triton")
        found = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert not WAITS & set(seen.names)
    seeds = {
        name: int(x)
        for name, _, arguments, _ in device.launches
        for x in arguments
        if torch.is_tensor(x) and x.dtype == torch.int64
    }
    assert list(seeds) == ["forward_kernel", "dq_kernel", "dkdv_kernel"]
    (seed,) = set(seeds.values())
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = fastattn.attention(*exact, dropout_p=0.3, seed=seed, backend="reference")
    torch.testing.assert_close(out.double(), expected, atol=4e-3, rtol=1e-2)
    for a, b in zip(found, torch.autograd.grad(expected, exact, torch.ones_like(expected)), strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-2, rtol=1e-2)


def test_stages_that_do_not_fit_are_given_up(fake, monkeypatch, caplog):
    """A part with less shared memory than its configuration takes computes all the same, and says so."""
    configs = importlib.import_module("fastattn.backends.triton.configs")
    large = configs.TileConfig(64, 64, 4, 5)
    monkeypatch.setattr(configs, "forward_config", lambda *_: large)
    device = fake(89)  # 99 KiB
    q, k, v = (torch.randn(1, 1, 100, 128).half() for _ in range(3))
    out = fastattn.attention(q, k, v, backend="triton")
    expected = fastattn.attention(q.double(), k.double(), v.double(), backend="reference")
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=1e-2)
    assert device.kernels == ["forward_kernel"]
    assert "runs with 4 pipeline stages instead of 5, which would take" in caplog.text


@pytest.mark.parametrize(("rows", "workspace"), [(100, []), (1, ["new_empty", "new_empty"])])
def test_a_launch_asks_torch_for_its_workspace_and_nothing_else(fake, rows, workspace):
    """So it can be captured in a CUDA graph: no value is read back, nothing is copied between devices."""
    fake(80, simulate=False)
    launch = importlib.import_module("fastattn.backends.triton.launch")
    q, k = torch.randn(1, 1, rows, 64).half(), torch.randn(1, 1, 2000, 64).half()
    inputs = fastattn.problem.AttentionInputs(q, k, k)
    problem = fastattn.problem.describe(inputs, (True, 0.125, -1, -1, 0.0, 0.0, 0, 0), True)
    out, lse = torch.empty_like(q), torch.empty(1, 1, rows)
    gradients = Gradients(q.clone(), k.clone(), k.clone())
    with Watch() as seen:
        launch.forward(problem, inputs, out, lse, 80, 108)
        assert seen.names == workspace
        launch.backward(problem, inputs, out, lse, q, None, gradients, 80)
    assert seen.names == [*workspace, "empty_like"]  # delta


def test_the_host_overhead_script_runs():
    """benchmarks/bench_launch.py, in a process of its own: its driver is another copy of this one."""
    script = Path(__file__).parents[3] / "benchmarks" / "bench_launch.py"
    command = [sys.executable, str(script), "--rounds", "1", "--calls", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()[2:]
    assert [line.count("µs") for line in lines] == [2] * 5
