"""What can be asked of the backend without a GPU: that it says so, costs nothing, chooses purely."""

import importlib
import subprocess
import sys

import pytest
import torch

import fastattn
from fastattn.backends import Backend
from fastattn.backends.triton import arguments, backend, configs
from fastattn.errors import BackendUnavailableError

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def test_follows_the_protocol():
    assert isinstance(backend, Backend)
    assert backend.name == "triton"


def test_importing_fastattn_does_not_import_triton():
    code = "import sys, fastattn, fastattn.backends.triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@no_gpu
def test_without_a_device_the_reason_is_given():
    reason = backend.status()
    assert reason
    (status,) = (status for status in fastattn.backends() if status.name == "triton")
    assert not status.available
    assert status.reason == reason
    q = torch.randn(1, 1, 4, 16)
    with pytest.raises(BackendUnavailableError, match="triton"):
        fastattn.attention(q, q, q, backend="triton")


@pytest.mark.parametrize(
    "arch", [80, 86, 87, 89, 90, 100, 103, 110, 120, 121, "gfx90a", "gfx942", "gfx1100", "interpreter"]
)
@pytest.mark.parametrize("head_dim", [1, 16, 40, 64, 80, 96, 128, 200, 256])
def test_every_shape_has_tiles(arch, head_dim):
    for itemsize, tf32 in ((2, False), (4, False), (4, True)):
        shape = (head_dim, head_dim, itemsize)
        tiles = [
            configs.forward_config(arch, *shape, tf32=tf32),
            configs.dq_config(arch, *shape, tf32),
            configs.dkdv_config(arch, *shape, tf32),
            configs.decode_config(arch, 1, *shape),
        ]
        bias = configs.bias_config(arch, *shape)
        assert bias.block_m == bias.block_n  # diagonals of tiles must hold diagonals of scores
        for config in (*tiles, bias):
            assert min(config.block_m, config.block_n) >= 16
            assert all(n & (n - 1) == 0 for n in (config.block_m, config.block_n, config.num_warps))


@pytest.mark.parametrize(
    ("tiles", "seqlen_k", "expected"), [(1, 255, 1), (1, 1024, 4), (264, 10**6, 1), (0, 10**6, 64)]
)
def test_keys_are_split_only_when_programs_are_few(tiles, seqlen_k, expected):
    assert configs.decode_splits(tiles, seqlen_k, processors=132) == expected


@pytest.mark.parametrize(
    ("arch", "expected"),
    [(80, "tf32"), (120, "tf32"), ("gfx942", "tf32"), ("gfx90a", "ieee"), ("gfx1100", "ieee")],
)
def test_tf32_where_torch_allows_it_and_the_part_has_it(arch, expected, monkeypatch):
    """Triton's compiler ends in an assertion where TF32 is asked of another part."""
    assert arguments.precision(torch.float32, arch) == "ieee"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert arguments.precision(torch.float32, arch) == expected
    assert arguments.precision(torch.float16, arch) == "ieee"


@pytest.fixture
def on_gpu(monkeypatch):
    """on_gpu(arch, release): what the backend says of a problem there, with that release of Triton."""

    def ask(arch, release):
        module = importlib.import_module("fastattn.backends.triton.backend")
        asked = module.TritonBackend()
        monkeypatch.setattr(module, "interpreting", lambda: True)
        monkeypatch.setattr(asked, "_device", lambda _: (arch, 4))
        monkeypatch.setattr(pytest.importorskip("triton"), "__version__", release)
        q = torch.randn(1, 1, 4, 16)
        inputs = fastattn.problem.AttentionInputs(q, q, q)
        return asked.supports(fastattn.problem.describe(inputs, (True, 0.25, -1, -1, 0.0, 0.0, 0, 0), True))

    return ask


@pytest.mark.parametrize("arch", [90, 100])
def test_releases_that_leave_out_a_fence_are_refused_where_it_matters(arch, on_gpu):
    for release in ("3.5.1", "3.6.0", "3.6.0+git1"):
        reason = on_gpu(arch, release)
        assert f"Triton {release}" in reason
        assert "3.7" in reason
        assert on_gpu(80, release) is None
        assert on_gpu(120, release) is None
        assert on_gpu("gfx942", release) is None
    for release in ("3.7.0", "3.9.0", "3.10.0", "4.0.0"):
        assert on_gpu(arch, release) is None


def test_turing_is_refused_by_name(on_gpu):
    assert "compute capability 8.0" in on_gpu(75, "3.9.0")
    assert "7.5" in on_gpu(75, "3.9.0")
