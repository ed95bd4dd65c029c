"""The library as users get it, with CUDA's own runtime inside, on a machine that may have no driver."""

from __future__ import annotations

import ctypes
import subprocess

import pytest
import simulated
import torch

from fastattn.backends.cuda.backend import CudaBackend
from fastattn.backends.cuda.library import open_library
from fastattn.errors import FastattnError, UnsupportedError
from fastattn.problem import AttentionInputs, AttentionOptions, describe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def path(request):
    reason = simulated.why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = request.config.cache.mkdir("cuda-real-runtime")
    return simulated.build(folder, "64", "f16", "plain", real_runtime=True)


@pytest.fixture
def cuda(path):
    backend = CudaBackend()
    backend._library = open_library(path)
    return backend


def problem_of(cuda, head_dim=64, **tensors):
    q = torch.zeros(1, 2, 4, head_dim, dtype=torch.float16)
    options = AttentionOptions(False, 0.1, -1, -1, 0.0, 0.0, 0, 0)
    inputs = AttentionInputs(q, q, q, **tensors)
    return cuda._problem(describe(inputs, options, False), inputs)[0]


def test_needs_no_driver_to_load(path):
    needed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a driver")
def test_a_device_error_has_a_text(cuda):
    with pytest.raises(FastattnError, match=r"asking for the device: .*driver"):
        cuda._device(0)


def test_kernels_left_out_are_refused(cuda):
    size = ctypes.c_int64()
    assert cuda._library.fastattn_cuda_forward_workspace(problem_of(cuda), 1, size) == 0
    launch = (ctypes.c_char * 0)()
    with pytest.raises(FastattnError, match="result is a null pointer"):
        cuda._check(cuda._library.fastattn_cuda_forward(problem_of(cuda), None, bytes(launch)))
    assert cuda._library.fastattn_cuda_num_splits(problem_of(cuda, head_dim=128), 100) == 1
    with pytest.raises(UnsupportedError, match="head dimension 128"):
        cuda._check(2)


def test_malformed_structs_are_refused(cuda):
    with pytest.raises(FastattnError, match=r"problem\.struct_size"):
        cuda._check(cuda._library.fastattn_cuda_forward_workspace(bytes(1024), 1, ctypes.c_int64()))
    with pytest.raises(FastattnError, match="problem is a null pointer"):
        cuda._check(cuda._library.fastattn_cuda_forward_workspace(None, 1, ctypes.c_int64()))
    with pytest.raises(FastattnError, match="num_splits"):
        cuda._check(cuda._library.fastattn_cuda_forward_workspace(problem_of(cuda), 0, ctypes.c_int64()))
