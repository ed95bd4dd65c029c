"""Which devices a library serves, and what `fastattn doctor` says of it.

The library is an object of Python's.
"""

from __future__ import annotations

import dataclasses
import importlib
import re

import pytest
import torch

from fastattn.backends.cuda.architectures import Built
from fastattn.backends.cuda.backend import CudaBackend
from fastattn.problem import AttentionInputs, AttentionOptions, describe

module = importlib.import_module("fastattn.backends.cuda.backend")  # the package's `backend` is the object
DEFAULT = "80,90a-real"


@pytest.mark.parametrize(
    ("architectures", "capability", "driver", "reason"),
    [
        (DEFAULT, 80, 13000, None),
        (DEFAULT, 89, 12000, None),  # machine code asks nothing of the driver that CUDA's runtime does not
        (DEFAULT, 75, 13000, "8.0 or newer, this device has 7.5"),
        (DEFAULT, 90, 13010, None),
        (DEFAULT, 120, 13020, None),
        (DEFAULT, 120, 13000, r"PTX of CUDA 13\.1 .* driver of CUDA 13\.0 .*--architectures 120"),
        ("80-real,90a-real", 90, 13010, r"built for other devices .* than one of 9\.0: .*--architectures 90"),
        ("80-real,90-real,120,90a-real", 100, 13010, r"other devices .* 10\.0"),
        ("80-real,90-real,120,90a-real", 121, 13000, None),
        ("86-real", 80, 13010, r"other devices \(machine code for sm_86\) than one of 8\.0"),
        ("80-virtual", 86, 13000, "driver of CUDA 13.0"),
        ("80-virtual", 86, 13010, None),
        ("90a-real", 90, 13010, "other devices"),
    ],
)
def test_why_not(architectures, capability, driver, reason):
    found = Built.parse(architectures).why_not(capability, 13010, driver)
    if reason is None:
        assert found is None
    else:
        assert re.search(reason, found), found


def test_in_words():
    assert str(Built.parse(DEFAULT)) == (
        "machine code for sm_80, PTX of sm_80, kernels of Hopper's own (sm_90a)"
    )
    assert str(Built.parse("90-real,80-real")) == "machine code for sm_80, sm_90"


class Library:
    """What CudaBackend asks of libfastattn_cuda, for devices of these capabilities."""

    def __init__(self, architectures, capabilities, driver):
        self.architectures, self.capabilities, self.driver = architectures, capabilities, driver

    def fastattn_cuda_architectures(self):
        return self.architectures.encode()

    def fastattn_cuda_versions(self, toolkit, driver):
        toolkit.value, driver.value = 13010, self.driver
        return 0

    def fastattn_cuda_device(self, index, capability, num_sms):
        if self.driver < 13000:
            return 5
        capability.value, num_sms.value = self.capabilities[index], 132
        return 0

    def fastattn_last_error(self):
        return b"asking for the device: the driver is too old"


@pytest.fixture
def pretend(monkeypatch):
    """A CudaBackend with a library and devices of these capabilities, and a torch that sees them."""

    def use(architectures: str, *capabilities: int, driver: int = 13010) -> CudaBackend:
        library = Library(architectures, capabilities, driver)
        monkeypatch.setattr(module, "open_library", lambda: library)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
        return CudaBackend()

    return use


def problem_on(index: int):
    q = torch.zeros(1, 2, 4, 64, dtype=torch.float16)
    options = AttentionOptions(False, 0.1, -1, -1, 0.0, 0.0, 0, 0)
    found = describe(AttentionInputs(q, q, q), options, False)
    return dataclasses.replace(found, device=torch.device("cuda", index))


def test_doctor_says_what_serves_each_device(pretend):
    cuda = pretend("80-real,90-real,90a-real", 90, 80, 120)
    assert cuda.status() is None
    built, driver, *devices = cuda.details()
    assert built == ("built by CUDA 13.1: machine code for sm_80, sm_90, kernels of Hopper's own (sm_90a)")
    assert driver == "driver: of CUDA 13.1"
    assert devices[:2] == ["cuda:0 GPU 0: runs its machine code", "cuda:1 GPU 1: runs its machine code"]
    assert devices[2].startswith("cuda:2 GPU 2: is built for other devices")


def test_ptx_is_translated_on_first_use(pretend):
    assert pretend(DEFAULT, 120).details()[2] == "cuda:0 GPU 0: runs its PTX, translated on first use"


def test_a_problem_is_refused_where_its_device_is(pretend):
    cuda = pretend("80-real", 80, 120)
    assert cuda.status() is None
    assert cuda.supports(problem_on(0)) is None
    assert "--architectures 120" in cuda.supports(problem_on(1))


def test_without_a_device_that_it_serves_it_is_not_available(pretend):
    assert "--architectures 120" in pretend("80-real", 120).status()
    assert "8.0 or newer" in pretend(DEFAULT, 75).status()


def test_a_driver_that_is_too_old_is_a_reason(pretend):
    cuda = pretend(DEFAULT, 90, driver=12080)
    assert "the driver is too old" in cuda.status()
    assert "driver: of CUDA 12.8" in cuda.details()
    assert "the driver is too old" in cuda.details()[2]


def test_what_was_built_is_said_without_a_driver_too(pretend):
    cuda = pretend(DEFAULT, driver=0)
    assert "the driver is too old" in cuda.status()
    assert cuda.details()[1:] == ["driver: none"]


def test_without_a_library_there_is_nothing_to_say(tmp_path, monkeypatch):
    original = module.open_library
    monkeypatch.setattr(module, "open_library", lambda: original(tmp_path / "libfastattn_cuda.so"))
    assert CudaBackend().details() == []
