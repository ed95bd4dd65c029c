"""Little PTX kernels for tests: one instruction (or a few) applied to arrays, a thread per element."""

import numpy as np

from . import In, Out, run_ptx

HEADER = ".version 8.8\n.target sm_90a\n.address_size 64\n"
PTX_TYPES = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}


def kernel(body, params=(), registers="", shared=0, threads=32):
    """PTX text of kernel `k` with u64 pointer parameters p0, p1, ... loaded into %ptr0, %ptr1, ..."""
    declared = ", ".join(f".param .u64 p{i}" for i in range(len(params)))
    loads = "\n".join(f"ld.param.u64 %ptr{i}, [p{i}];" for i in range(len(params)))
    memory = f".shared .align 1024 .b8 sm[{shared}];" if shared else ""
    return f"""{HEADER}
.visible .entry k({declared})
.reqntid {threads}
{{
.reg .pred %p<16>; .reg .b16 %h<32>; .reg .b32 %r<256>; .reg .f32 %f<256>; .reg .b64 %d<32>; .reg .f64 %g<16>;
.reg .b64 %ptr<8>; .reg .b64 %at<8>; .reg .b32 %tid; .reg .b64 %wide; {registers}
{memory}
{loads}
mov.u32 %tid, %tid.x;
cvt.u64.u32 %wide, %tid;
{body}
ret;
}}
"""


def run(body, *params, shared=0, threads=32, registers="", grid=1, **options):
    """Run a kernel body; params are arrays (wrapped in In or Out as wanted). Returns the Report."""
    text = kernel(body, params, registers, shared, threads)
    return run_ptx(text, "k", grid=grid, args=list(params), **options)


def elementwise(instruction, out_dtype, *inputs, out_type=None):
    """Apply `instruction` with %0 = destination and %1, %2, ... = sources to arrays of equal length."""
    n = len(inputs[0])
    out = np.zeros(n, out_dtype)
    lines, text = [], instruction
    for i, a in enumerate([out, *inputs]):
        kind = PTX_TYPES[a.dtype.itemsize]
        name = f"%x{i}"
        lines.append(f".reg .{kind if kind != 'b8' else 'b16'} {name};")
        lines.append(f"mad.lo.u64 %at{i}, %wide, {a.dtype.itemsize}, %ptr{i};")
        if i:
            lines.append(f"ld.global.{kind} {name}, [%at{i}];")
        text = text.replace(f"%{i}", name)
    lines.append(text)
    lines.append(f"st.global.{PTX_TYPES[out.dtype.itemsize]} [%at0], %x0;")
    run("\n".join(lines), Out(out), *[In(a) for a in inputs], threads=n)
    return out
