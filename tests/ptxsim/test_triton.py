"""Independently compiled kernels must come out right, and stop doing so when broken."""

import re

import numpy as np
import pytest

from . import (
    In,
    LaunchError,
    MemoryFault,
    Out,
    PtxError,
    RaceFault,
    compile_triton,
    launch_triton,
    run_triton,
    why_no_triton,
)
from .rounding import bf16_to_f32, f32_to_bf16

reason = why_no_triton()
if reason:
    pytest.skip(reason, allow_module_level=True)

from . import triton_kernels as kernels  # noqa: E402

RNG = np.random.default_rng()


class Typed:
    """Random numbers in a kernel's dtype: `.raw` for the kernel, `.exact` in float64."""

    def __init__(self, shape, dtype, values=None):
        x = RNG.standard_normal(shape).astype(np.float32) if values is None else values
        self.dtype = dtype
        if dtype == "bf16":
            self.array = f32_to_bf16(x).reshape(shape)
        else:
            self.array = x.astype({"fp16": np.float16, "fp32": np.float32}[dtype])

    @property
    def exact(self):
        return (bf16_to_f32(self.array) if self.dtype == "bf16" else self.array).astype(np.float64)

    @property
    def raw(self):
        return ("*bf16", self.array) if self.dtype == "bf16" else self.array


EPS = {"fp16": 2**-11, "bf16": 2**-8, "fp32": 2**-24, "tf32": 2**-11}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "precision"), [("fp16", "ieee"), ("bf16", "ieee"), ("fp32", "tf32"), ("fp32", "ieee")]
)
def test_matmul(arch, dtype, precision):
    m, n, k = 70, 90, 75
    a, b = Typed((m, k), dtype), Typed((k, n), dtype)
    c = Typed((m, n), dtype)
    args = dict(a_ptr=In(a.raw), b_ptr=In(b.raw), c_ptr=Out(c.raw), M=m, N=n, K=k, sa=k, sb=n, sc=n)
    report, _ = run_triton(
        kernels.matmul,
        args,
        grid=(2, 2),
        arch=arch,
        constexprs=dict(BM=64, BN=64, BK=32, PRECISION=precision),
    )
    unit = EPS["tf32" if precision == "tf32" else dtype]
    bound = (
        np.abs(a.exact) @ np.abs(b.exact) * max(2.1 * unit if precision == "tf32" else 0, k * 2**-23) + 1e-6
    )
    want = a.exact @ b.exact
    assert (np.abs(c.exact - want) <= bound + np.abs(want) * EPS[dtype]).all()
    matrix = report.count("wgmma.mma_async" if arch == 90 else "mma.sync")
    assert (matrix > 0) == (precision == "tf32" or dtype != "fp32")


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_softmax_and_layer_norm(dtype):
    x = Typed((5, 777), dtype)
    y = Typed((5, 777), dtype)
    run_triton(
        kernels.softmax,
        dict(x_ptr=In(x.raw), y_ptr=Out(y.raw), columns=777, stride=777),
        grid=5,
        constexprs=dict(BLOCK=1024),
    )
    e = np.exp(x.exact - x.exact.max(1, keepdims=True))
    np.testing.assert_allclose(y.exact, e / e.sum(1, keepdims=True), rtol=2 * EPS[dtype] + 1e-6, atol=1e-7)
    w, b = Typed(777, dtype), Typed(777, dtype)
    args = dict(x_ptr=In(x.raw), w_ptr=In(w.raw), b_ptr=In(b.raw), y_ptr=Out(y.raw), columns=777, eps=1e-5)
    run_triton(kernels.layer_norm, args, grid=5, arch=90, constexprs=dict(BLOCK=1024))
    want = (x.exact - x.exact.mean(1, keepdims=True)) / np.sqrt(x.exact.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        y.exact, want * w.exact + b.exact, rtol=4 * EPS[dtype], atol=8 * EPS[dtype] + 1e-6
    )


class Attention:
    """Inputs, compiled kernel and reference of one attention problem."""

    def __init__(self, arch, dtype, d=64, m=100, n=150, causal=False, batch=2, warps=4, rows=64, stages=2):
        self.shape = (batch, m, d)
        self.q, self.k, self.v = (
            Typed(self.shape, dtype),
            Typed((batch, n, d), dtype),
            Typed((batch, n, d), dtype),
        )
        self.o, self.lse = Typed(self.shape, dtype), np.zeros((batch, m), np.float32)
        self.args = dict(
            q_ptr=In(self.q.raw), k_ptr=In(self.k.raw), v_ptr=In(self.v.raw), o_ptr=Out(self.o.raw),
            lse_ptr=Out(self.lse), M=m, N=n, scale=d**-0.5,
        )  # fmt: skip
        self.grid = (-(-m // rows), batch)
        self.compiled = compile_triton(
            kernels.attention, self.args, arch, num_warps=warps, num_stages=stages,
            constexprs=dict(CAUSAL=causal, D=d, BM=rows, BN=64),
        )  # fmt: skip
        s = self.q.exact @ self.k.exact.swapaxes(1, 2) * d**-0.5
        if causal:
            s = np.where(np.tri(m, n, dtype=bool), s, -np.inf)
        top = s.max(-1, keepdims=True)
        p = np.exp(s - top)
        self.want = p / p.sum(-1, keepdims=True) @ self.v.exact
        self.want_lse = (top + np.log(p.sum(-1, keepdims=True)))[..., 0]
        # Both operands of a product lose digits, in scores that may be large.
        self.unit = 2 * EPS["tf32"] if dtype == "fp32" else EPS[dtype]

    def run(self, ptx=None, **options):
        return launch_triton(self.compiled, self.args, grid=self.grid, ptx=ptx, **options)

    def error(self):
        """Largest error in units of what the dtype allows."""
        return max(
            float(np.nan_to_num(np.abs(self.o.exact - self.want) / (4 * self.unit), nan=np.inf).max()),
            float(np.nan_to_num(np.abs(self.lse - self.want_lse) / (8 * self.unit), nan=np.inf).max()),
        )


@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize(
    ("dtype", "d", "causal", "warps", "rows"),
    [
        ("fp16", 64, True, 4, 64),
        ("bf16", 64, False, 4, 64),
        ("fp16", 128, True, 8, 128),
        ("fp32", 32, False, 4, 64),
    ],
)
def test_attention(arch, dtype, d, causal, warps, rows):
    case = Attention(arch, dtype, d, causal=causal, warps=warps, rows=rows, m=150 if causal else 100)
    report = case.run()
    assert case.error() < 1
    assert report.count("wgmma.mma_async" if arch == 90 else "mma.sync") > 0


def mutations(ptx, pattern, replace):
    """(description, altered text) for every match of `pattern`."""
    for m in re.finditer(pattern, ptx):
        line = ptx.count("\n", 0, m.start()) + 1
        yield f"{m.group()!r} at line {line}", ptx[: m.start()] + replace(m) + ptx[m.end() :]


def survivors(case, pattern, replace):
    """Mutations that neither raise nor spoil the result, with how many there were."""
    alive, count = [], 0
    for name, text in mutations(case.compiled.asm["ptx"], pattern, replace):
        count += 1
        try:
            case.run(text)
        except PtxError:
            continue
        if case.error() < 1:
            alive.append(name)
    return alive, count


@pytest.mark.parametrize("arch", [80, 90])
def test_a_missing_barrier_is_caught(arch):
    """Triton's last barrier before reusing scratch memory can be redundant; no other may be removed unnoticed."""
    case = Attention(arch, "fp16", m=64, n=150, batch=1)
    alive, count = survivors(case, r"bar\.sync[^;]*;", lambda m: ";")
    assert count >= 4
    assert len(alive) <= 1, alive


@pytest.mark.parametrize("arch", [80, 90])
def test_waiting_for_one_group_too_few_is_caught(arch):
    case = Attention(arch, "fp16", m=64, n=250, batch=1, stages=3)
    more = lambda m: m.group(1) + str(int(m.group(2)) + 1)  # noqa: E731
    alive, count = survivors(case, r"(cp\.async\.wait_group\s+)(\d+)", more)
    # A wait after the loop covers copies that were predicated off; each one in the loop is needed.
    assert count - len(alive) >= 1
    with pytest.raises(RaceFault, match="has not been waited for"):
        case.run(re.sub(r"cp\.async\.wait_group\s+\d+", "cp.async.wait_group 9", case.compiled.asm["ptx"]))


def test_wgmma_needs_its_wait_and_its_fence():
    case = Attention(90, "fp16", m=64, n=150, batch=1)
    alive, count = survivors(case, r"wgmma\.wait_group\.sync\.aligned[^;]*;", lambda m: ";")
    assert count >= 2
    assert alive == []
    with pytest.raises(RaceFault, match=r"no fence\.proxy\.async"):
        case.run(case.compiled.asm["ptx"].replace("fence.proxy.async.shared::cta;", ";"))


def test_a_dropped_store_mask_is_caught():
    case = Attention(80, "fp16", m=100, n=64, batch=1)
    ptx = case.compiled.asm["ptx"]
    stores = list(re.finditer(r"@%p\d+ (st\.global\.v4)", ptx))
    assert len(stores) >= 4
    with pytest.raises(MemoryFault, match="out of bounds"):
        case.run(re.sub(r"@%p\d+ (st\.global\.v4)", r"\1", ptx))


def test_too_little_shared_memory_is_caught():
    case = Attention(80, "fp16", m=64, n=64, batch=1)
    from . import run_ptx

    arrays = [case.q.array, case.k.array, case.v.array, case.o.array, case.lse]
    size = case.compiled.metadata.shared
    call = dict(grid=1, args=[*arrays, 64, 64, 0.125, None, None])
    run_ptx(case.compiled.asm["ptx"], shared=size, **call)
    with pytest.raises(MemoryFault, match="out of bounds"):
        run_ptx(case.compiled.asm["ptx"], shared=size - 16, **call)


def test_wrong_fragment_register_is_caught():
    case = Attention(80, "fp16", m=64, n=64, batch=1)
    swap = lambda m: f"{m.group(1)}{m.group(3)}, {m.group(2)}{m.group(4)}"  # noqa: E731
    pattern = r"(mma\.sync[^{]*\{[^}]*\}, \{ )(%r\d+), (%r\d+)(, %r\d+, %r\d+ \})"
    for name, text in list(mutations(case.compiled.asm["ptx"], pattern, swap))[::16]:
        case.run(text)
        assert case.error() > 1, name


def test_scan_sort_and_atomics():
    x = RNG.integers(0, 8, 200).astype(np.int32)
    y, histogram = np.zeros(400, np.int32), np.zeros(8, np.int32)
    args = dict(x_ptr=In(x), y_ptr=Out(y), histogram_ptr=histogram, n=200)
    for arch in (80, 90):
        histogram[:] = 0
        run_triton(kernels.scan_and_count, args, grid=1, arch=arch, constexprs=dict(BLOCK=256))
        np.testing.assert_array_equal(y[:200], np.cumsum(x))
        np.testing.assert_array_equal(y[200:], np.sort(x))
        np.testing.assert_array_equal(histogram, np.bincount(x, minlength=8))


def test_atomics_across_blocks():
    x, y = RNG.standard_normal((100, 64)).astype(np.float32), np.zeros(64, np.float32)
    for arch in (80, 90):
        y[:] = 0
        run_triton(
            kernels.outer_sum,
            dict(x_ptr=In(x), y_ptr=y, n=100),
            grid=4,
            arch=arch,
            constexprs=dict(BM=32, BN=64),
        )
        np.testing.assert_allclose(y, x.sum(0, dtype=np.float64), atol=1e-4)
    with pytest.raises(MemoryFault, match="never written"):
        run_triton(
            kernels.outer_sum, dict(x_ptr=In(x), y_ptr=Out(y), n=100), grid=4, constexprs=dict(BM=32, BN=64)
        )


def test_arguments_are_checked_by_name():
    x = np.zeros(64, np.float32)
    with pytest.raises(LaunchError, match="'columns' of softmax has no value"):
        run_triton(kernels.softmax, dict(x_ptr=x, y_ptr=x, stride=64), grid=1, constexprs=dict(BLOCK=64))
    with pytest.raises(LaunchError, match="no parameter"):
        run_triton(
            kernels.softmax,
            dict(x_ptr=x, y_ptr=x, columns=1, stride=64, z=1),
            grid=1,
            constexprs=dict(BLOCK=64),
        )


def test_faults_name_the_source_line():
    x = np.zeros(60, np.float32)
    with pytest.raises(MemoryFault) as e:
        run_triton(
            kernels.softmax,
            dict(x_ptr=In(x), y_ptr=Out(x), columns=64, stride=64),
            grid=1,
            constexprs=dict(BLOCK=64),
        )
    assert e.value.source.startswith("triton_kernels.py:")
