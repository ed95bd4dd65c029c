"""The CPU backend's seam with the native library: structs, threads, instruction sets."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch

import fastattn
from fastattn.backends import Backend
from fastattn.backends.cpu import abi, library
from fastattn.dispatch import load
from fastattn.errors import FastattnError
from fastattn.problem import AttentionInputs, describe

TESTS = Path(__file__).parents[1]

_CHECK = """
import sys
sys.path.insert(0, {tests!r})
import torch
from hypothesis import HealthCheck, given, settings
import oracle
from fastattn.dispatch import load

assert load("cpu").isa() == {isa!r}, load("cpu").isa()
torch.set_num_threads(2)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for head_dim in (16, 40, 64, 128):
        oracle.check(oracle.Case(dtype=dtype, lengths=((35, 70),), head_dim=head_dim, head_dim_v=head_dim))

@settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(case=oracle.cases())
def check(case):
    torch.manual_seed(0)
    oracle.check(case)

check()
"""


def _isas() -> list[str]:
    backend = load("cpu")
    return [] if isinstance(backend, str) else backend.isas()


@pytest.mark.parametrize("isa", _isas())
def test_every_instruction_set_of_this_machine(isa):
    """Each computes every feature within the rule, in a process that is told to use it."""
    done = subprocess.run(
        [sys.executable, "-c", _CHECK.format(tests=str(TESTS), isa=isa)],
        env={**os.environ, "FASTATTN_CPU_ISA": isa, "PYTHONPATH": str(Path(fastattn.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture
def medium_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


_MANY_FEATURES = oracle.Case(
    lengths=((33, 0), (70, 129), (1, 40)),
    packed=True,
    group=2,
    head_dim=65,
    head_dim_v=65,
    relative_bias=True,
    options={"dropout_p": 0.3, "seed": 5, "softcap": 5.0},
    wanted=("q", "k", "v", "relative_bias"),
)

_BF16_ISAS = [isa for isa in _isas() if isa.endswith("bf16")]


@pytest.mark.skipif(not _BF16_ISAS, reason="no instruction set of this machine multiplies bfloat16")
@pytest.mark.parametrize("isa", _BF16_ISAS)
def test_medium_precision_takes_fp32_products_in_bfloat16(cpu, monkeypatch, medium_precision, isa):
    """fp32 tensors are held to the rule of bfloat16, and q, k and v count as rounded to it, bit for bit."""
    monkeypatch.setenv("FASTATTN_CPU_ISA", isa)
    for case in (
        oracle.Case(dtype=torch.bfloat16, lengths=((35, 70),), head_dim=40, head_dim_v=24),
        oracle.Case(dtype=torch.bfloat16, lengths=((300, 300),), head_dim=64, options={"causal": True}),
        replace(_MANY_FEATURES, dtype=torch.bfloat16),
        oracle.Case(dtype=torch.bfloat16, lengths=((40, 90),) * 2, mask=0.4, wanted=("q",), layout="sliced"),
    ):
        oracle.check(case, given_as=torch.float32)
    q, k, v = (torch.randn(2, 3, 70, 40) for _ in range(3))
    out = fastattn.attention(q, k, v, backend="cpu")
    rounded = (x.bfloat16().float() for x in (q, k, v))
    assert torch.equal(out, fastattn.attention(*rounded, backend="cpu"))
    torch.set_float32_matmul_precision("high")
    full = fastattn.attention(q, k, v, backend="cpu")
    assert not torch.equal(out, full)
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(full, fastattn.attention(q, k, v, backend="cpu"))


@pytest.mark.skipif("amx_bf16" not in _isas(), reason="this machine has no AMX")
def test_high_precision_splits_fp32_products(cpu, monkeypatch):
    """Sums of two bfloat16 numbers keep 16 bits: errors below 2**-15, where one alone leaves 2**-9."""
    monkeypatch.setenv("FASTATTN_CPU_ISA", "amx_bf16")
    for limit in ("_SPLIT_SEQLEN", "_SPLIT_HEAD_DIM"):
        monkeypatch.setattr(sys.modules[type(cpu).__module__], limit, 1)
    precisions = ("high", "highest")
    for case in (
        oracle.Case(lengths=((35, 70),), head_dim=40, head_dim_v=24),
        oracle.Case(lengths=((300, 520),) * 2, head_dim=64, head_dim_v=64, options={"causal": True}),
        oracle.Case(lengths=((300, 300),), kv_heads=70, head_dim=64, head_dim_v=64, mask=0.4),
        _MANY_FEATURES,
        oracle.Case(lengths=((40, 90),) * 2, mask=0.4, wanted=("q",), layout="sliced"),
        oracle.Case(lengths=((40, 90),) * 2, bias=(False, True, True, True), wanted=("k", "v", "bias")),
    ):
        tensors = case.tensors()
        exact = oracle.run(case, tensors, _upstream(case, tensors), backend="reference", dtype=torch.float64)
        found = {}
        for precision in precisions:
            monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
            found[precision] = oracle.run(case, tensors, _upstream(case, tensors), backend="cpu")
        for name, right in exact.items():
            seen = right.isfinite()  # no key, no lse
            scale = right[seen].square().mean().sqrt()
            error, error_fp32 = (
                (found[precision][name].double() - right)[seen].square().mean().sqrt() / scale
                for precision in precisions
            )
            assert error <= 2**-15, (name, error)
            assert error > error_fp32, "or nothing was split"


def _upstream(case, tensors):
    generator = torch.Generator().manual_seed(1)
    shape = (*tensors["q"].shape[:-1], case.head_dim_v)
    return {"out": torch.randn(shape, generator=generator, dtype=torch.float64), "lse": None}


@pytest.mark.skipif("amx_bf16" not in _isas(), reason="this machine has no AMX")
def test_split_products_leave_out_what_no_query_sees(cpu, monkeypatch):
    """Infinities and NaN in keys that causal attention hides reach no other row."""
    monkeypatch.setenv("FASTATTN_CPU_ISA", "amx_bf16")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    q, k, v = (torch.randn(1, 2, 1100, 64) for _ in range(3))
    assert "each fp32 number as two" in fastattn.explain(q, k, v, backend="cpu").kernel
    clean = fastattn.attention(q, k, v, causal=True, backend="cpu")
    k[:, :, 700:], v[:, :, 700:] = math.inf, math.nan
    spoilt = fastattn.attention(q, k, v, causal=True, backend="cpu")
    torch.testing.assert_close(spoilt[:, :, :700], clean[:, :, :700], rtol=1e-4, atol=1e-4)
    assert "two" not in fastattn.explain(q[:, :, :500], k[:, :, :500], v[:, :, :500], backend="cpu").kernel


def test_the_library_is_there():
    """Where it is not, all else is skipped, which must not pass for success unless it was asked for."""
    backend = load("cpu")
    if (library.PATH.parent / "SKIPPED").exists():
        pytest.skip(str(backend))
    assert not isinstance(backend, str), backend


def test_it_keeps_the_protocol(cpu):
    assert isinstance(cpu, Backend)


def test_structs_have_the_sizes_the_library_expects(cpu):
    """The library refuses a struct whose size it doesn't know, so one byte less must fail."""
    q = torch.randn(1, 1, 2, 16)
    inputs = AttentionInputs(q, q, q)
    problem = describe(inputs, (False, 0.25, -1, -1, 0.0, 0.0, 0, 0), False)
    whole = abi.problem_struct(abi.fixed_part(problem), problem, inputs)
    out = torch.empty_like(q)
    result, executor = abi.forward_struct(out, None), abi.executor_struct(0, 1)
    call = cpu._library.fastattn_cpu_forward
    assert call(whole, result, executor) == abi.STATUS_OK
    shorter = (len(whole) - 8).to_bytes(4, sys.byteorder) + whole[4:]
    assert call(shorter, result, executor) == abi.STATUS_INVALID_ARGUMENT
    assert b"struct_size" in cpu._library.fastattn_last_error()


def test_it_runs_on_torchs_threads_and_on_its_own(cpu, monkeypatch):
    assert library.torch_parallel_for() != 0, "this torch exports no torch_parallel_for"
    q = torch.randn(2, 4, 70, 32)
    lent = fastattn.attention(q, q, q, backend="cpu")
    monkeypatch.setattr(cpu, "_executors", {torch.get_num_threads(): abi.executor_struct(0, 2)})
    own = fastattn.attention(q, q, q, backend="cpu")
    assert torch.equal(lent, own)


def test_a_library_of_another_abi_is_refused(cpu, monkeypatch):
    monkeypatch.setattr(abi, "ABI_VERSION", abi.ABI_VERSION + 1)
    with pytest.raises(library.LibraryMissingError, match="ABI version"):
        library.open_library()


def test_threads_of_python_share_it(cpu):
    """Calls from several Python threads at once: nothing but workspaces outlives a call."""
    from concurrent.futures import ThreadPoolExecutor

    inputs = [torch.randn(1, 2, 20 + 7 * n, 16) for n in range(8)]
    expected = [fastattn.attention(x, x, x, causal=True, backend="cpu") for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            found = list(pool.map(lambda x: fastattn.attention(x, x, x, causal=True, backend="cpu"), inputs))
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_an_instruction_set_that_is_not_there_is_refused_by_name(cpu, monkeypatch):
    q = torch.randn(1, 1, 4, 16)
    for name in ("avx1024", "AVX2", "amx_bf16" if "amx_bf16" not in cpu.isas() else "none"):
        monkeypatch.setenv("FASTATTN_CPU_ISA", name)
        with pytest.raises(FastattnError, match=name) as caught:
            fastattn.attention(q, q, q, backend="cpu")
        assert all(isa in str(caught.value) for isa in cpu.isas()), "it says what there is"
        with pytest.raises(FastattnError, match=f"FASTATTN_CPU_ISA is '?{name}'?,"):
            fastattn.explain(q, q, q)
        assert any(name in line and "refused" in line for line in cpu.details())
    for name in ("", *cpu.isas()):
        monkeypatch.setenv("FASTATTN_CPU_ISA", name)
        fastattn.attention(q, q, q, backend="cpu")
