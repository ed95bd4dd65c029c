"""Fixtures for tests on a real GPU (test_gpu*.py)."""

import pytest
import torch

from fastattn import dispatch


@pytest.fixture(scope="module", params=["triton", "cuda"])
def backend(request):
    """The name of each backend for GPUs that is there."""
    loaded = dispatch.load(request.param)
    if isinstance(loaded, str):
        pytest.skip(f"{request.param}: {loaded}")
    return request.param


@pytest.fixture
def on_the_gpu():
    """Every tensor is made on the GPU."""
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
