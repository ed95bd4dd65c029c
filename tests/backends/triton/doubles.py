"""What tests put in the place of the backend and of its kernels."""

import importlib

from ptxsim import compile_triton, launch_triton

from fastattn import dispatch

KERNELS = (
    "forward_kernel",
    "merge_kernel",
    "delta_kernel",
    "dq_kernel",
    "dkdv_kernel",
    "dbias_kernel",
    "join_diagonals_kernel",
)
"""By their names in launch.py."""


def launch_module():
    return importlib.import_module("fastattn.backends.triton.launch")


def of_launch(arguments):
    """(runtime arguments, constexprs, options) of what a kernel is launched with."""
    options = {n: arguments[n] for n in ("num_warps", "num_stages", "enable_fp_fusion") if n in arguments}
    constexprs = {name: value for name, value in arguments.items() if name.isupper()}
    return {n: x for n, x in arguments.items() if n not in options | constexprs}, constexprs, options


SMALL_KERNELS = {"rows": ("unpad_kernel", "pad_kernel"), "rotary": ("rotary_kernel",)}
"""Those of modules that launch for themselves."""


def kernels():
    """Every kernel that the backend launches."""
    modules = {name: importlib.import_module(f"fastattn.backends.triton.{name}") for name in SMALL_KERNELS}
    own = [getattr(modules[module], name) for module, names in SMALL_KERNELS.items() for name in names]
    return [getattr(launch_module(), name) for name in KERNELS] + own


def forget():
    """Drop whatever is prepared: it is of a driver, or of a kernel's double."""
    launch_module().forget()
    for name in SMALL_KERNELS:
        importlib.import_module(f"fastattn.backends.triton.{name}")._prepare.cache_clear()


def count_jit(module, name, monkeypatch, names=None):
    """The list (names, or a new one) that the kernel's name joins when a launch goes through Triton's JIT."""
    kernel, names = getattr(module, name), [] if names is None else names
    original = kernel.run

    def run(*args, **kwargs):
        names.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(kernel, "run", run)
    return names


class Recorder:
    """Takes a kernel's place in launch.py and keeps what it would be launched with."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda **arguments: self.launches.append((self.kernel, grid, arguments))


class SimulatedKernel:
    """Takes a kernel's place in launch.py: compiles for `arch` and runs the PTX on CPU tensors."""

    def __init__(self, kernel, arch, runs):
        self.kernel, self.arch, self.runs = kernel, arch, runs

    def __getitem__(self, grid):
        return lambda **arguments: self.run(grid, *of_launch(arguments))

    def run(self, grid, arguments, constexprs, options):
        compiled = compile_triton(self.kernel, arguments, self.arch, constexprs=constexprs, **options)
        report = launch_triton(compiled, arguments, grid=grid)
        self.runs.append((self.kernel.fn.__name__, compiled, report))


def pretend(arch, monkeypatch):
    """backend="triton" takes CPU tensors for those of a GPU of that architecture, with four processors.

    A seed of shape (1,) counts as one on the device, one without axes as one on the host.
    """
    module = importlib.import_module("fastattn.backends.triton.backend")
    backend = module.TritonBackend()
    monkeypatch.setattr(module, "interpreting", lambda: True)
    monkeypatch.setattr(backend, "_device", lambda _: (arch, 4))
    monkeypatch.setattr(backend, "_asked", True)
    monkeypatch.setitem(dispatch._backends, "triton", backend)
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(launch_module(), "_read_in_kernels", lambda seed: seed.dim() == 1)
    forget()
