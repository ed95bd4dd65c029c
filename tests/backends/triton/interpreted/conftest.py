"""These tests run the kernels in Triton's interpreter, in a process where nothing is compiled.

Triton reads TRITON_INTERPRET when a kernel is defined, so they are collected only where it is set from the
start: ../test_interpreted.py starts such a process.
"""

import os

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*.py"]


def repaired_dot(upstream):
    """create_dot of Triton's interpreter, which multiplies bfloat16 by its bit patterns."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def widened(handle):
        if handle.dtype != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return upstream(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    return create_dot


@pytest.fixture(autouse=True)
def bf16_dot(request, monkeypatch):
    """Repairs bfloat16 products, except for the test that watches for upstream to have done so."""
    from triton.runtime.interpreter import InterpreterBuilder

    if "upstream_dot" not in request.fixturenames:
        monkeypatch.setattr(InterpreterBuilder, "create_dot", repaired_dot(InterpreterBuilder.create_dot))


@pytest.fixture
def upstream_dot():
    """Asks for Triton's own tl.dot."""


@pytest.fixture(autouse=True)
def quiet_numpy():
    """1/0 and log 0 on rows that see nothing are what the kernels select away."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True)
def seeds_on_the_device(monkeypatch):
    """A seed of shape (1,) counts as one on a GPU: see ../doubles.py."""
    import doubles

    monkeypatch.setattr(doubles.launch_module(), "_read_in_kernels", lambda seed: seed.dim() == 1)
