"""I8: a slower path than asked for is an error with everybody's reasons, never a surprise."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn import dispatch, reference
from fastattn.backends.cpu import backend as cpu_backend
from fastattn.backends.cpu.library import LibraryMissingError, open_library
from fastattn.errors import BackendUnavailableError, InvalidArgumentError, UnsupportedError

Q = torch.randn(1, 2, 5, 16)


@pytest.fixture
def never_reference(monkeypatch):
    def refuse(*_):
        raise AssertionError("the reference was called")

    monkeypatch.setattr(reference, "attention", refuse)


@pytest.fixture
def no_library(monkeypatch, never_reference):
    """An installation without the native library."""
    fresh = type(cpu_backend)()
    monkeypatch.setattr(dispatch, "_backends", {"cpu": "libfastattn_cpu.so is not installed"})
    monkeypatch.setattr(dispatch, "_chosen", {})
    return fresh


def test_without_the_library_auto_says_why_and_what_to_do(no_library):
    with pytest.raises(UnsupportedError) as caught:
        fastattn.attention(Q, Q, Q)
    assert "not installed" in caught.value.reasons["cpu"]
    assert "backend='reference'" in str(caught.value)


def test_without_the_library_a_forced_backend_says_why(no_library):
    with pytest.raises(BackendUnavailableError, match="not installed"):
        fastattn.attention(Q, Q, Q, backend="cpu")


def test_a_missing_library_is_explained(tmp_path):
    with pytest.raises(LibraryMissingError, match="C\\+\\+ compiler"):
        open_library(tmp_path / "libfastattn_cpu.so")


def test_a_library_left_out_on_request_is_said_to_be(tmp_path):
    (tmp_path / "SKIPPED").write_text("installed with FASTATTN_SKIP_NATIVE=1.\n")
    with pytest.raises(LibraryMissingError, match=r"FASTATTN_SKIP_NATIVE=1\. With a C\+\+ compiler"):
        open_library(tmp_path / "libfastattn_cpu.so")


def test_a_file_that_is_no_library_is_explained(tmp_path):
    path = tmp_path / "libfastattn_cpu.so"
    path.write_bytes(b"not a library")
    with pytest.raises(LibraryMissingError, match="does not load"):
        open_library(path)


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_what_the_kernel_cannot_do_is_refused(cpu, never_reference, backend):
    q = Q.double()
    with pytest.raises(UnsupportedError) as caught:
        fastattn.attention(q, q, q, backend=backend)
    assert "float64" in caught.value.reasons["cpu"]


def test_an_unknown_backend_is_named():
    with pytest.raises(InvalidArgumentError, match="'fastest'"):
        fastattn.attention(Q, Q, Q, backend="fastest")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("backend", ["cuda"])
def test_a_gpu_backend_on_the_cpu_is_refused(never_reference, backend):
    with pytest.raises((BackendUnavailableError, UnsupportedError)):
        fastattn.attention(Q, Q, Q, backend=backend)


def test_the_reference_runs_when_asked_for_and_then_alone(monkeypatch):
    monkeypatch.setattr(dispatch, "choose", lambda *_: pytest.fail("a kernel was chosen"))
    assert fastattn.attention(Q, Q, Q, backend="reference").shape == Q.shape


def test_backends_lists_each_with_a_reason():
    statuses = {status.name: status for status in fastattn.backends()}
    assert list(statuses) == ["triton", "cuda", "cpu", "reference"]
    assert all(status.available or status.reason for status in statuses.values())
    assert statuses["reference"].available
