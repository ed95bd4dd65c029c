"""The Triton backend on CPU tensors: its whole launch path, or its kernels as PTX in the simulator."""

import gc

import pytest


@pytest.fixture(scope="session")
def driver_folder(tmp_path_factory):
    """Where this session's libcuda.so.1 is built."""
    return tmp_path_factory.mktemp("fake-libcuda")


@pytest.fixture
def fake(driver_folder, monkeypatch):
    """fake(arch, simulate=True) makes backend="triton" launch on CPU tensors; gives the FakeCuda."""
    import doubles
    import fake_cuda

    installed = []

    def install(arch, simulate=True):
        device = fake_cuda.FakeCuda(driver_folder, arch, simulate)
        doubles.pretend(arch, monkeypatch)
        device.install()
        installed.append(device)
        return device

    yield install
    doubles.forget()
    for kernel in doubles.kernels():
        kernel.device_caches.clear()  # so that `kernels` tells all that the next test needs
    gc.collect()  # unloads compiled kernels, for which their driver must still be there
    for device in installed:
        device.remove()


@pytest.fixture
def simulate(monkeypatch):
    """simulate(arch) makes backend="triton" run on CPU tensors in the simulator.

    Gives the list of its runs: (name, CompiledKernel, Report) of each.
    """
    import doubles

    launch = doubles.launch_module()

    def install(arch):
        runs = []
        for name in doubles.KERNELS:
            kernel = getattr(launch, name)
            kernel = kernel.kernel if isinstance(kernel, doubles.SimulatedKernel) else kernel
            monkeypatch.setattr(launch, name, doubles.SimulatedKernel(kernel, arch, runs))
        doubles.pretend(arch, monkeypatch)
        return runs

    yield install
    launch.forget()
