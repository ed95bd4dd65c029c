"""The host's part of a call: device, stream, workspace, and what becomes of an error. No kernel runs."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import types

import pytest
import torch
from simulated import LAUNCH

from fastattn.backends import Gradients
from fastattn.backends.cpu import abi
from fastattn.backends.cuda.backend import _LAUNCH, CudaBackend
from fastattn.backends.cuda.library import open_library
from fastattn.errors import FastattnError
from fastattn.problem import AttentionInputs, AttentionOptions, describe

DEVICE = torch.device("cuda", 3)
STREAM = 0x1234560


class RecordingCuda(CudaBackend):
    """Keeps (kernel, stream, whether DEVICE was current) of each launch; that of `fail_at` fails."""

    def __init__(self, path):
        super().__init__()
        self._library = open_library(path)
        self._library.fake_cudart_launch_stream.restype = ctypes.c_void_p
        self._callback = LAUNCH(self._record)
        self._library.fake_cudart_on_launch(self._callback)
        self.launches: list[tuple[str, int, bool]] = []
        self.current = False
        self.fail_at: int | None = None
        self.shift = 0

    def _record(self, name, *_) -> int:
        self.launches.append((name.decode(), self._library.fake_cudart_launch_stream(), self.current))
        return int(len(self.launches) - 1 == self.fail_at)

    def refuse(self, function: str) -> None:
        self._library.fake_cudart_refuse(function.encode())

    def _allocate(self, size, problem):
        whole = torch.empty(size + 512, dtype=torch.uint8)
        start = -whole.data_ptr() % 256
        return whole[start + self.shift :]


@pytest.fixture
def cuda(library, monkeypatch):
    backend = RecordingCuda(library("64", "f16", "plain"))
    backend._library.fake_cudart_set_capability(80)

    @contextlib.contextmanager
    def guard(device):
        assert device == DEVICE
        backend.current = True
        try:
            yield
        finally:
            backend.current = False

    def current_stream(device):
        assert device == DEVICE
        return types.SimpleNamespace(cuda_stream=STREAM)

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    yield backend
    backend.refuse("")
    backend._library.fake_cudart_set_capability(80)


def packed():
    """Rows that must be copied and a packed layout, whose rest is filled: all launches but the merge."""
    x = torch.zeros(12, 2, 33, dtype=torch.float16)[..., :31]
    cu = torch.tensor([0, 5, 9], dtype=torch.int32)
    return problem_of(AttentionInputs(x, x, x, cu_seqlens_q=cu, cu_seqlens_k=cu), 5, 5)


def padded(queries=70, keys=90):
    q, k = (torch.zeros(1, 2, rows, 64, dtype=torch.float16) for rows in (queries, keys))
    return problem_of(AttentionInputs(q, k, k))


def problem_of(inputs, longest_q=0, longest_k=0):
    options = AttentionOptions(False, 0.1, -1, -1, 0.0, 0.0, longest_q, longest_k)
    return dataclasses.replace(describe(inputs, options, True), device=DEVICE), inputs


def forward(cuda, problem, inputs):
    out = torch.zeros(*inputs.q.shape[:-1], inputs.v.shape[-1], dtype=inputs.q.dtype)
    cuda.forward(problem, inputs, out, torch.zeros(out.shape[:-1]))
    return out


def backward(cuda, problem, inputs):
    x = torch.zeros(*inputs.q.shape[:-1], inputs.v.shape[-1], dtype=inputs.q.dtype)
    gradients = Gradients(*(torch.zeros(t.shape, dtype=t.dtype) for t in inputs[:3]))
    cuda.backward(problem, inputs, x, torch.zeros(x.shape[:-1]), x, None, gradients)


def kinds(cuda) -> list[str]:
    words = ("pack", "forward", "combine", "row_statistics", "key_gradient", "query_gradient", "fill")
    return [next(word for word in words if word in name) for name, *_ in cuda.launches]


def test_every_launch_is_on_torchs_stream_and_device(cuda):
    for run in (forward, backward):
        run(cuda, *packed())
    assert set(kinds(cuda)) == {
        "pack", "forward", "row_statistics", "key_gradient", "query_gradient", "fill"
    }  # fmt: skip
    assert {(stream, current) for _, stream, current in cuda.launches} == {(STREAM, True)}
    assert not cuda.current


def test_the_merge_of_splits_too(cuda):
    forward(cuda, *padded(1, 4096))
    assert kinds(cuda) == ["forward", "combine"]
    assert {launch[1:] for launch in cuda.launches} == {(STREAM, True)}


TEXTS = {
    "pack": "launching a copy",
    "forward": "launching a kernel",
    "combine": "launching the merge of splits",
    "row_statistics": "launching the row statistics",
    "key_gradient": "launching a kernel",
    "query_gradient": "launching a kernel",
    "fill": "launching a fill",
}


@pytest.mark.parametrize("run", [forward, backward])
@pytest.mark.parametrize("make", [packed, lambda: padded(1, 4096)], ids=["packed", "split"])
def test_a_launch_that_fails_is_an_error_with_its_text(cuda, run, make):
    """Whichever it is; and nothing is launched after it."""
    run(cuda, *make())
    names = kinds(cuda)
    for at, name in enumerate(names):
        cuda.launches.clear()
        cuda.fail_at = at
        with pytest.raises(FastattnError, match=rf"status 4: {TEXTS[name]}: refused by the simulated"):
            run(cuda, *make())
        assert kinds(cuda) == names[: at + 1]
        assert not cuda.current, "the device before the call is current again"
    cuda.fail_at = None
    run(cuda, *make())  # an error leaves nothing behind


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("cudaFuncSetAttribute", "preparing a kernel"),
        ("cudaGetDevice", "asking for the device"),
        ("cudaDeviceGetAttribute", "asking for the device"),
    ],
)
@pytest.mark.parametrize("run", [forward, backward])
def test_what_the_runtime_refuses_is_an_error_with_its_text(cuda, function, text, run):
    cuda._sms(padded()[0])  # remembered
    cuda.refuse(function)
    with pytest.raises(FastattnError, match=text):
        run(cuda, *padded())
    assert not {"forward", "key_gradient", "query_gradient"} & set(kinds(cuda))


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("an old driver", "has no cuTensorMapEncodeTiled; it is older than CUDA 12"),
        ("cudaGetDriverEntryPointByVersion", "asking for cuTensorMapEncodeTiled"),
        ("cuTensorMapEncodeTiled", r"refused a tensor \(error 1\)"),
    ],
)
@pytest.mark.parametrize("run", [forward, backward])
def test_without_tensor_maps_hoppers_kernels_are_an_error(cuda, function, text, run):
    cuda._library.fake_cudart_set_capability(90)
    cuda.refuse(function)
    with pytest.raises(FastattnError, match=text):
        run(cuda, *padded())
    assert not {"forward", "key_gradient", "query_gradient"} & set(kinds(cuda))
    cuda.refuse("")
    run(cuda, *padded())
    assert any("sm90" in name for name, _, _ in cuda.launches)


def test_a_device_where_tensor_maps_are_not_asked_for(cuda):
    cuda.refuse("an old driver")
    forward(cuda, *padded())
    assert kinds(cuda) == ["forward"]


def test_a_misaligned_workspace_is_refused(cuda):
    cuda.shift = 16
    with pytest.raises(FastattnError, match="workspace is not aligned to 256 bytes"):
        forward(cuda, *packed())
    with pytest.raises(FastattnError, match="workspace is not aligned to 256 bytes"):
        backward(cuda, *packed())
    assert not cuda.launches


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({0: 8}, r"launch\.struct_size is 8"),
        ({1: 0}, "num_splits is 0"),
        ({4: 1}, r"the call needs \d+ bytes of workspace and was given 1"),
        ({3: 0}, r"the call needs \d+ bytes of workspace and was given 0"),
    ],
    ids=["size", "splits", "too small", "null"],
)
def test_a_malformed_launch_is_refused(cuda, monkeypatch, changed, text):
    right = cuda._launch

    def wrong(*arguments):
        packed_launch, workspace = right(*arguments)
        fields = list(_LAUNCH.unpack(packed_launch))
        for index, value in changed.items():
            fields[index] = value
        return _LAUNCH.pack(*fields), workspace

    monkeypatch.setattr(cuda, "_launch", wrong)
    for run in (forward, backward):
        with pytest.raises(FastattnError, match=text):
            run(cuda, *packed())
    assert not cuda.launches


def test_no_launch_at_all_is_refused(cuda):
    problem, inputs = padded()
    out = torch.zeros_like(inputs.q)
    result = abi.forward_struct(out, None)
    with pytest.raises(FastattnError, match="launch is a null pointer"):
        cuda._check(cuda._library.fastattn_cuda_forward(cuda._problem(problem, inputs)[0], result, None))


def test_without_a_need_of_it_there_may_be_no_workspace(cuda, monkeypatch):
    monkeypatch.setattr(cuda, "_allocate", lambda size, problem: torch.empty(0, dtype=torch.uint8))
    forward(cuda, *padded())
    assert kinds(cuda) == ["forward"]
