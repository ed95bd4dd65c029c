"""Compile Triton kernels and CUDA sources to PTX without a GPU, and launch Triton's result in the simulator."""

import shutil
import subprocess
import tempfile
from math import prod
from pathlib import Path

import numpy as np

from .errors import LaunchError
from .launch import run_ptx
from .memory import In, Out

TYPES = {
    "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64", "int8": "i8", "int16": "i16",
    "int32": "i32", "int64": "i64", "uint8": "u8", "uint16": "u16", "uint32": "u32", "uint64": "u64", "bool": "i1",
}  # fmt: skip


def why_no_triton():
    """None when Triton can compile in this process, otherwise the reason why not."""
    import importlib.util
    import os

    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set: kernels are interpreted in this process, not compiled"
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def compile_triton(fn, args, arch=80, *, num_warps=4, num_stages=2, constexprs=None, **options):
    """Compile a @triton.jit function as a launch with `args` (a dict by parameter name) would specialise it.

    Pointers are numpy arrays, torch tensors, In, Out, or (for a bfloat16 held in uint16) a ("*bf16", array) pair;
    scalars are ints (i32, or i64 beyond its range) and floats. Integers divisible by 16 are marked so, those equal
    to 1 and None become constants, as Triton's launcher does. arch 80 is sm_80. Returns Triton's CompiledKernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, dict(constexprs or {}), {}
    unknown = set(args) | set(constants)
    for i, name in enumerate(fn.arg_names):
        unknown.discard(name)
        if name in constants:
            signature[name] = "constexpr"
        elif name not in args:
            raise LaunchError(f"parameter {name!r} of {fn.__name__} has no value")
        else:
            signature[name], constant, aligned = _specialise(name, args[name], fn.params[i])
            if constant is not _NOT_CONSTANT:
                constants[name] = constant
            elif aligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
    if unknown:
        raise LaunchError(f"{fn.__name__} has no parameter {sorted(unknown)}")
    keyed = {(fn.arg_names.index(k),): v for k, v in constants.items()}
    source = ASTSource(fn, signature=signature, constexprs=keyed, attrs=attributes)
    chosen = {"enable_fp_fusion": True, **options}
    return triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options=dict(num_warps=num_warps, num_stages=num_stages, **chosen),
    )


_NOT_CONSTANT = object()


def _specialise(name, value, param):
    """(type, constant or _NOT_CONSTANT, divisible by 16) of one argument."""
    if param.is_constexpr:
        return "constexpr", value, False
    if value is None:
        return "constexpr", None, False
    if isinstance(value, tuple):
        return value[0], _NOT_CONSTANT, True
    if isinstance(value, In | Out):
        value = value.array
        if isinstance(value, tuple):
            return value[0], _NOT_CONSTANT, True
    if (
        hasattr(value, "dtype")
        and hasattr(value, "shape")
        and len(getattr(value, "strides", (1,)) or (1,)) >= 0
    ):
        kind = str(value.dtype).removeprefix("torch.")
        return "*" + TYPES[kind], _NOT_CONSTANT, True
    if isinstance(value, bool):
        return "i1", _NOT_CONSTANT, False
    if isinstance(value, int):
        if value == 1 and not param.do_not_specialize:
            return "constexpr", 1, False
        wide = "i32" if -(2**31) <= value < 2**31 else "i64"
        return wide, _NOT_CONSTANT, value % 16 == 0 and not param.do_not_specialize
    if isinstance(value, float):
        return "fp32", _NOT_CONSTANT, False
    raise LaunchError(f"argument {name!r}: {value!r} has no Triton type")


def run_triton(
    fn, args, *, grid, arch=80, num_warps=4, num_stages=2, constexprs=None, compile_options=None, **options
):
    """Compile a @triton.jit function for `arch` and execute its PTX: (Report, CompiledKernel).

    args as in compile_triton; grid as in run_ptx; further keywords are simulator Options.
    """
    compiled = compile_triton(
        fn,
        args,
        arch,
        num_warps=num_warps,
        num_stages=num_stages,
        constexprs=constexprs,
        **(compile_options or {}),
    )
    return launch_triton(compiled, args, grid=grid, **options), compiled


def launch_triton(compiled, args, *, grid, ptx=None, **options):
    """Execute an already compiled Triton kernel (or `ptx`, an altered text of it) by Triton 3.9's launch ABI:

    constants are no parameters, the rest come in order, then pointers to global scratch and profile scratch.
    """
    source = compiled.src
    values = []
    for name, typ in source.signature.items():
        if typ != "constexpr" and (source.fn.arg_names.index(name),) not in source.constants:
            values.append(_plain(args[name]))
    meta = compiled.metadata
    scratch = None
    if meta.global_scratch_size:
        scratch = Out(
            np.zeros(meta.global_scratch_size * prod(grid if isinstance(grid, tuple) else (grid,)), np.uint8)
        )
    return run_ptx(
        ptx or compiled.asm["ptx"],
        meta.name,
        grid=grid,
        args=[*values, scratch, None],
        shared=meta.shared,
        **options,
    )


def _plain(value):
    if isinstance(value, tuple):
        return value[1]
    if isinstance(value, In | Out) and isinstance(value.array, tuple):
        return type(value)(value.array[1])
    return value


def why_no_nvcc():
    """None when nvcc is on the PATH, otherwise the reason why CUDA sources can't be compiled."""
    return None if shutil.which("nvcc") else "nvcc is not on the PATH"


def compile_cuda(source, arch="80", *, flags=()):
    """PTX of a CUDA C++ source text (or Path) for sm_`arch`. Raises LaunchError with nvcc's messages."""
    with tempfile.TemporaryDirectory() as folder:
        path = source if isinstance(source, Path) else Path(folder) / "kernel.cu"
        if not isinstance(source, Path):
            path.write_text(source)
        out = Path(folder) / "kernel.ptx"
        command = [
            "nvcc",
            "-std=c++17",
            "-O3",
            f"-arch=compute_{arch}",
            "-ptx",
            str(path),
            "-o",
            str(out),
            *flags,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LaunchError(f"nvcc failed:\n{done.stderr}")
        return out.read_text()
