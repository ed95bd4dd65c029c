"""The launch path of a GPU on CPU tensors, for tests that look at launches and not at kernels."""

import gc
import importlib

import pytest

from fastattn import dispatch


@pytest.fixture
def fake(request, monkeypatch):
    """fake(arch, simulate=True) makes backend="triton" launch on CPU tensors; gives the FakeCuda."""
    import fake_cuda

    launch = importlib.import_module("fastattn.backends.triton.launch")
    module = importlib.import_module("fastattn.backends.triton.backend")
    installed = []

    def install(arch, simulate=True):
        device = fake_cuda.FakeCuda(request.config.cache.mkdir("fake-libcuda"), arch, simulate)
        backend = module.TritonBackend()
        monkeypatch.setattr(module, "interpreting", lambda: True)
        monkeypatch.setattr(backend, "_device", lambda _: (arch, 4))
        monkeypatch.setattr(backend, "_asked", True)
        monkeypatch.setitem(dispatch._backends, "triton", backend)
        monkeypatch.setattr(dispatch, "_chosen", {})
        launch.forget()
        device.install()
        installed.append(device)
        return device

    yield install
    launch.forget()
    for kernel in (launch.forward_kernel, launch.delta_kernel, launch.dq_kernel, launch.dkdv_kernel):
        kernel.device_caches.clear()  # so that `kernels` tells all that the next test needs
    gc.collect()  # unloads compiled kernels, for which their driver must still be there
    for device in installed:
        device.remove()
