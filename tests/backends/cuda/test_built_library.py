"""The library that `fastattn build-cuda` left in this installation: every kernel of it, as machine code.

Skipped where it is not built. test_statistics.py looks closer at the main loops of some of them.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from pathlib import Path

import machine_code
import pytest
import torch

from fastattn import build_cuda
from fastattn.backends.cuda.backend import CudaBackend
from fastattn.backends.cuda.library import PATH
from fastattn.errors import FastattnError

LARGEST = 60 << 20
MAIN_LOOPS = Path(__file__).with_name("main_loops.json")
VARIANTS = {"f32": ("plain", "all")}
EVERY_VARIANT = ("plain", "dropout", "softcap", "alibi", "relative", "bias", "all")
HOPPER = list(itertools.product(("f16", "bf16"), (64, 128, 256)))

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.slow,
    pytest.mark.skipif(not PATH.exists(), reason=f"{PATH.name} is not built: fastattn build-cuda"),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[str, machine_code.Kernel]:
    pytest.importorskip("triton", reason="Triton's wheel has the disassembler")
    found = machine_code.kernels(PATH, tmp_path_factory.mktemp("cubins"))
    named = {kernel.name: kernel for kernel in found}
    assert len(named) == len(found)
    missing = expected() - set(named)
    if missing:
        pytest.skip(f"a part of the table only: {len(missing)} kernels are not in it")
    return named


def expected() -> set[str]:
    """What the table of csrc/cuda/CMakeLists.txt says."""
    names = set()
    for type_, dim in itertools.product(build_cuda.TYPES, build_cuda.DIMS):
        gradients = ("key_gradient_dk", "key_gradient_dv") if dim == 256 else ("key_gradient",)
        for variant in VARIANTS.get(type_, EVERY_VARIANT):
            kinds = ["forward", "query_gradient", *gradients]
            if variant in ("relative", "bias", "all") and (type_, dim) != ("f32", 256):
                kinds.append("score_gradient")
            names |= {f"sm80 {kind} {type_} {dim} {variant}" for kind in kinds}
    for type_, dim in HOPPER:
        kinds = ["forward", "query_gradient", "key_gradient_dk", "key_gradient_dv"]
        kinds += ["key_gradient"] if dim <= 128 else []
        names |= {f"sm90 {kind} {type_} {dim}" for kind in kinds}
    return names


def test_every_product_is_the_matrix_units(kernels):
    """What follows the architecture in these names are the kernels that multiply matrices."""
    for kernel in kernels.values():
        if not kernel.name.startswith("sm"):
            assert not kernel.matrix_kinds, kernel.name
            continue
        unit = "HGMMA.64x" if kernel.name.startswith("sm90") else "HMMA."
        assert kernel.matrix_kinds, kernel.name
        assert all(kind.startswith(unit) for kind in kernel.matrix_kinds), kernel
        assert kernel.matrix_loops > 0, kernel.name


def test_no_kernel_spills(kernels):
    """Where one begins to, see REGISTER_LEVEL in csrc/cuda/CMakeLists.txt and kHoldsRows in forward.h."""
    assert {k.name: k.spills for k in kernels.values() if k.spills} == {}


TYPES = {"Half": "f16", "BFloat16": "bf16"}
FEATURES = {"0": "plain", "1": "softcap", "16": "dropout"}


def test_main_loops_are_those_of_the_table(kernels):
    """Which test_statistics.py makes from sources of its own, with flags of its own."""
    for instance, table in json.loads(MAIN_LOOPS.read_text()).items():
        if instance.startswith("sm_90 "):
            continue  # what a driver makes of the PTX
        hopper = instance.startswith("sm_90a ")
        type_, dim, *features = instance.removeprefix("sm_90a ").split()
        rest = [] if hopper else [FEATURES[features[0]]]
        for name, entry in table.items():
            kernel = " ".join(
                ["sm90" if hopper else "sm80", name.replace(" ", "_"), TYPES[type_], dim, *rest]
            )
            assert kernels[kernel].main_loop == entry["main_loop"]["instructions"], kernel


def test_its_size():
    assert PATH.stat().st_size <= LARGEST


def test_it_needs_no_driver_to_load():
    if os.name == "posix":
        needed = subprocess.run(["ldd", PATH], capture_output=True, text=True, check=True).stdout
        assert "libcuda" not in needed
    cuda = CudaBackend()
    status = cuda.status()
    assert "does not load" not in (status or "")
    assert "built by CUDA" in cuda.details()[0]
    if not torch.cuda.is_available():
        assert status
        with pytest.raises(FastattnError, match="asking for the device: "):
            cuda._device(0)
