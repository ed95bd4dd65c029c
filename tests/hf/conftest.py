import pytest
from zoo import one_thread

from fastattn.backends.cpu.backend import CpuBackend

__all__ = ["one_thread"]


@pytest.fixture
def gradients(monkeypatch):
    """(keys, which of dq, dk, dv, dbias, drelative_bias) of every call of the native backward."""
    calls = []
    backward = CpuBackend.backward

    def noting(self, problem, *args):
        calls.append((problem.total_k, tuple(gradient is not None for gradient in args[-1])))
        return backward(self, problem, *args)

    monkeypatch.setattr(CpuBackend, "backward", noting)
    return calls
