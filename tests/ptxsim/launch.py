"""Run a kernel: registers the arguments as buffers, lays out shared memory, runs the grid, copies results back."""

import struct
from math import prod

import numpy as np

from .errors import LaunchError
from .layout import Layout
from .machine import Machine, Options
from .memory import GlobalMemory, In, Out, as_numpy
from .parser import Module, parse
from .report import Report
from .tensormap import BYTES, TensorMap

SCALARS = {
    "u8": "B", "s8": "b", "b8": "B", "u16": "H", "s16": "h", "b16": "H", "u32": "I", "s32": "i", "b32": "I",
    "u64": "Q", "s64": "q", "b64": "Q", "f32": "f", "f64": "d", "f16": "e",
}  # fmt: skip


class Struct:
    """A by-value struct parameter: fields (format as in `struct`, or None for a pointer) and their values, in
    order, aligned as C would. Example: Struct(("Q", None), q), ("i", n)) — see README."""

    def __init__(self, *fields):
        self.fields = fields


def run_ptx(ptx, kernel=None, *, grid, block=None, args, shared=0, options=None, **option_values):
    """Execute `kernel` of a PTX text (or parsed Module) and return its Report.

    grid, block: ints or tuples of up to 3. block may be omitted when the kernel has .reqntid. args: one per kernel
    parameter: numpy arrays or torch CPU tensors become pointers to copies that are written back afterwards; wrap
    them in In (read-only) or Out (poisoned first); None is a null pointer; numbers become scalars; Struct a struct
    passed by value. shared: bytes of dynamic shared memory. Options: see Options; keywords override them.
    Raises a PtxError (MemoryFault, RaceFault, Deadlock, UnsupportedInstruction, ...) and then writes nothing back.
    """
    module = ptx if isinstance(ptx, Module) else parse(ptx)
    kernel = _choose(module, kernel)
    options = Options(**{**(vars(options) if options else {}), **option_values})
    grid, block = _dims(grid), _block(kernel, block)
    if len(args) != len(kernel.params):
        raise LaunchError(
            f"{kernel.name} has {len(kernel.params)} parameters, {len(args)} arguments were given"
        )
    layout = Layout(module, kernel, shared)
    memory = GlobalMemory()
    layout.place_globals(module, kernel, memory)
    fill = [_argument(p, a, memory) for p, a in zip(kernel.params, args, strict=True)]
    memory.commit()
    layout.param_bytes = _parameters(kernel, layout, fill)
    report = Report(kernel)
    with np.errstate(all="ignore"):
        _run_grid(kernel, layout, grid, block, memory, options, report)
    memory.write_back()
    return report


def _run_grid(kernel, layout, grid, block, memory, options, report):
    total = prod(grid)
    per_block = -(-prod(block) // 32) * 32
    most = max(1, options.group_threads // per_block)
    groups = -(-total // most)
    machines = {}
    for ids in np.array_split(np.arange(total), groups) if total else []:
        if len(ids) not in machines:
            machines[len(ids)] = Machine(kernel, layout, len(ids), block, grid, memory, options, report)
        machines[len(ids)].run(ids)


def _choose(module, name):
    if name is None:
        if len(module.kernels) != 1:
            raise LaunchError(f"name one of the kernels: {', '.join(module.kernels)}")
        return next(iter(module.kernels.values()))
    found = [k for k in module.kernels if k == name] or [k for k in module.kernels if name in k]
    if len(found) != 1:
        raise LaunchError(f"{name!r} names {len(found)} kernels of: {', '.join(module.kernels)}")
    return module.kernels[found[0]]


def _dims(value):
    value = (value,) if isinstance(value, int) else tuple(int(v) for v in value)
    if not 1 <= len(value) <= 3 or any(v < 0 for v in value):
        raise LaunchError(f"dimensions {value}: one to three non-negative numbers")
    return value + (1,) * (3 - len(value))


def _block(kernel, block):
    required = kernel.directives.get("reqntid")
    if required:
        required = _dims(required)
        if block is not None and _dims(block) != required:
            raise LaunchError(f"{kernel.name} requires blocks of {required}, not {_dims(block)}")
        return required
    if block is None:
        raise LaunchError(f"{kernel.name} has no .reqntid: give the block's size")
    block = _dims(block)
    most = prod(kernel.directives.get("maxntid", (1024,)))
    if not 0 < prod(block) <= most:
        raise LaunchError(f"blocks of {prod(block)} threads, {kernel.name} allows 1 to {most}")
    return block


def _argument(param, value, memory):
    """A callable giving the parameter's bytes once addresses are known."""
    mode = "inout"
    if isinstance(value, In | Out):
        mode, value = ("in" if isinstance(value, In) else "out"), value.array
    if value is None or (hasattr(value, "shape") and not isinstance(value, np.generic)):
        if param.size != 8:
            raise LaunchError(f"parameter {param.name} is {param.size} bytes, not a pointer")
        address = 0 if value is None else memory.add(as_numpy(value), mode, param.name).address
        return struct.pack("<Q", address)
    if isinstance(value, TensorMap):
        if param.size != BYTES:
            raise LaunchError(f"parameter {param.name} is {param.size} bytes, not a tensor map")
        return value.encode(memory.add(as_numpy(value.array), mode, param.name).address)
    if isinstance(value, Struct):
        return _struct(param, value, memory)
    if isinstance(value, bytes):
        if len(value) != param.size:
            raise LaunchError(f"parameter {param.name} is {param.size} bytes, {len(value)} were given")
        return value
    if param.type not in SCALARS or param.size != struct.calcsize(SCALARS[param.type]):
        raise LaunchError(f"parameter {param.name} ({param.type}, {param.size} bytes) can't take {value!r}")
    code = SCALARS[param.type]
    try:
        if code not in "efd":
            value = int(value)
            code = code.lower() if value < 0 else code
        return struct.pack("<" + code, value)
    except (struct.error, OverflowError) as e:
        raise LaunchError(f"parameter {param.name} ({param.type}) can't take {value!r}: {e}") from e


def _struct(param, value, memory):
    raw = b""
    for code, field in value.fields:
        size = 8 if code is None else struct.calcsize(code)
        raw = raw.ljust(-(-len(raw) // size) * size, b"\0")
        if code is None:
            mode = "in" if isinstance(field, In) else "out" if isinstance(field, Out) else "inout"
            array = field.array if isinstance(field, In | Out) else field
            address = 0 if array is None else memory.add(as_numpy(array), mode, param.name).address
            raw += struct.pack("<Q", address)
        else:
            raw += struct.pack("<" + code, field)
    if len(raw) > param.size:
        raise LaunchError(f"parameter {param.name} is {param.size} bytes, the struct has {len(raw)}")
    return raw.ljust(param.size, b"\0")


def _parameters(kernel, layout, fill):
    raw = np.zeros(max(layout.param_size, 1), np.uint8)
    for p, data in zip(kernel.params, fill, strict=True):
        at = layout.symbols[p.name]
        raw[at : at + p.size] = np.frombuffer(data, np.uint8)
    return raw
