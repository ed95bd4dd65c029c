"""What a call of the Triton backend costs the host, measured without a GPU.

    python benchmarks/bench_launch.py [--rounds 20] [--calls 50]

Everything is real down to Triton's launcher in C; behind it stands a driver that launches nothing
(tests/backends/triton/fake_cuda.py). "jit": each launch passes its arguments through Triton's JIT, as every
launch but the first did before prepared.py. CPU time of the process a call, medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import fastattn

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / part) for part in ("", "backends/triton")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=50, help="in a round")
    arguments = parser.parse_args(argv)
    import fake_cuda

    if (reason := fake_cuda.why_not()) is not None:
        print(f"nothing was measured: {reason}")
        return 0
    torch.set_num_threads(1)
    with null_driver():
        import triton

        print(f"torch {torch.__version__}, triton {triton.__version__}, {platform.machine()}")
        print(f"{'':34} {'jit':>8} {'prepared':>9}")
        for name, step in steps().items():
            jit, prepared = measure(step, arguments.rounds, arguments.calls)
            print(f"{name:34} {jit:5.0f} µs {prepared:6.0f} µs")
    return 0


@contextlib.contextmanager
def null_driver(arch: int = 80) -> Iterator[None]:
    """backend="triton" launches on CPU tensors, and nothing runs."""
    import doubles
    import fake_cuda
    import pytest

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        device = fake_cuda.FakeCuda(Path(folder), arch, simulate=False)
        doubles.pretend(arch, patch)
        device.install()
        try:
            yield
        finally:
            doubles.launch_module().forget()
            device.remove()


def steps() -> dict[str, Callable[[], object]]:
    from fastattn.backends.triton import rotary, rows

    q = torch.randn(2, 4, 64, 64).half()
    leaf = q.clone().requires_grad_()
    upstream = torch.randn_like(q)
    token, keys = torch.randn(1, 8, 1, 64).half(), torch.randn(1, 2, 2000, 64).half()
    cos, sin = torch.randn(2, 1, 64, 64).half()
    turned = torch.empty_like(q), torch.empty_like(q)
    matrix, kept = torch.randn(64, 256).half(), torch.arange(0, 64, 2)

    def both() -> None:
        out = fastattn.attention(leaf, leaf, leaf, causal=True, backend="triton")
        torch.autograd.grad(out, leaf, upstream)

    return {
        "forward": lambda: fastattn.attention(q, q, q, causal=True, backend="triton"),
        "forward and backward, by autograd": both,
        "decode, keys split and merged": lambda: fastattn.attention(token, keys, keys, backend="triton"),
        "padding left out (unpad)": lambda: rows.unpad(matrix, kept),
        "rotary positions of q and k": lambda: rotary.rotate((q, q), turned, cos, sin, False),
    }


def measure(step: Callable[[], object], rounds: int, calls: int) -> list[float]:
    """Microseconds of CPU time a call: [through the JIT, prepared]."""
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for found, way in zip(taken, (through_the_jit, contextlib.nullcontext), strict=True):
            with way():
                step()
                start = time.process_time()
                for _ in range(calls):
                    step()
                found.append((time.process_time() - start) / calls * 1e6)
    return [statistics.median(found) for found in taken]


@contextlib.contextmanager
def through_the_jit() -> Iterator[None]:
    from fastattn.backends.triton.prepared import Launch

    def call(self: Launch, pointers: dict, seed: int | None = None) -> None:
        self._first(pointers if seed is None else pointers | {"seed": seed})

    prepared, Launch.__call__ = Launch.__call__, call
    try:
        yield
    finally:
        Launch.__call__ = prepared


if __name__ == "__main__":
    sys.exit(main())
