"""The same problems on a real GPU, by each backend for one: what `make gpu-check` runs; skipped without one.

The sizes are those at which tiles, pipelines and grids are full, which the interpreter and the simulator are
too slow for; torch's default device makes every tensor of a case one of the GPU's.
"""

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from oracle import Case

import fastattn
from fastattn.errors import UnsupportedError

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
    pytest.mark.usefixtures("on_the_gpu"),
]

LONG = ((1023, 1100),)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"]
)
@pytest.mark.parametrize("head_dim", [16, 32, 40, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_head_dims(dtype, head_dim, causal, backend):
    case = Case(dtype, LONG, head_dim=head_dim, head_dim_v=head_dim, options={"causal": causal})
    oracle.check(case, backend)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(oracle.cases())
def test_any_combination(backend, case):
    try:
        oracle.check(case, backend)
    except UnsupportedError:  # with its reason; test_head_dims holds what no backend may refuse
        reject()


def test_addresses_beyond_32_bits(backend):
    """Rows more than 2**31 elements apart: an overflow would read somewhere else."""
    rows, stride = 70, 2**31 // 64
    free, _ = torch.cuda.mem_get_info()
    if free < 2.5 * 2 * rows * stride:
        pytest.skip("needs 12 GiB of free memory")
    storage = torch.zeros((rows - 1) * stride + 64, dtype=torch.float16)
    k = storage.as_strided((1, 1, rows, 64), (0, 0, stride, 1))
    k.copy_(torch.randn(1, 1, rows, 64))
    q = torch.randn(1, 1, 33, 64).half()
    near = k.contiguous()
    assert torch.equal(
        fastattn.attention(q, k, k, backend=backend), fastattn.attention(q, near, near, backend=backend)
    )


def test_twice_the_same_call_is_bit_identical(backend):
    q, k, v = (torch.randn(2, 8, 1000, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    runs = []
    for _ in range(2):
        out = fastattn.attention(q, k, v, causal=True, dropout_p=0.1, seed=5, backend=backend)
        runs.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_dropout_is_the_cpu_backends(cpu, backend):
    q, k, v = (torch.randn(2, 2, 130, 64, device="cpu") for _ in range(3))
    options = {"dropout_p": 0.3, "seed": 2**63 + 11}
    ours = fastattn.attention(q.cuda(), k.cuda(), v.cuda(), backend=backend, **options)
    with torch.device("cpu"):
        theirs = fastattn.attention(q, k, v, backend="cpu", **options)
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)


def test_captured_in_a_graph(backend):
    """No synchronisation and no allocation that a capture would refuse."""
    q, k, v = (torch.randn(2, 4, 256, 64, dtype=torch.float16) for _ in range(3))
    seed = torch.tensor([7])
    expected = fastattn.attention(q, k, v, dropout_p=0.1, seed=seed, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fastattn.attention(q, k, v, dropout_p=0.1, seed=seed, backend=backend)
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [768, 4096, 31])
def test_padding_left_out_and_put_back(dtype, columns):
    kernels = pytest.importorskip("fastattn.backends.triton.rows")
    rows = torch.nonzero(torch.rand(20_000) < 0.5).squeeze(1)
    matrix = torch.randn(20_000, columns, dtype=dtype)
    packed = kernels.unpad(matrix, rows)
    assert torch.equal(packed, matrix.index_select(0, rows))
    padded = kernels.pad(packed, rows, len(matrix))
    assert torch.equal(padded, torch.zeros_like(matrix).index_copy(0, rows, packed))
