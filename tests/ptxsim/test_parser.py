import numpy as np
import pytest

from . import ParseError, UnsupportedInstruction, parse, run_ptx
from .harness import HEADER, kernel, run
from .parser import Imm, Mem, Reg, Vec


def test_operands_scopes_and_positions():
    module = parse(
        HEADER
        + """
.extern .shared .align 16 .b8 smem[];  // dynamic
.global .align 4 .b8 table[8] = {1, 2, 0x10};
.visible .entry f(.param .u64 .ptr .global .align 1 f_param_0, .param .align 8 .b8 s[24], .param .f32 x)
.reqntid 128, 1, 1
{
	.reg .b32 %r<4>; .reg .pred p, q;
	.loc 1 7 3
$top: /* a label */
	@!p ld.global.v2.b32 { %r0, %r1 }, [ %r2 + -4 ];
	{ .reg .b32 p; mov.b32 p, 0f3F800000; L: bra.uni L; }
	mov.b32 %r3, 0xFFU;
	bra $top;
}
"""
    )
    k = module.kernels["f"]
    assert [(p.name, p.size) for p in k.params] == [("f_param_0", 8), ("s", 24), ("x", 4)]
    assert k.directives["reqntid"] == (128, 1, 1)
    assert [v.name for v in module.variables] == ["smem", "table"]
    assert module.variables[1].init == bytes([1, 2, 16, 0, 0, 0, 0, 0])
    load, move, inner, number, jump = k.instrs
    assert load.operands == [Vec((Reg("%r0"), Reg("%r1"))), Mem(Reg("%r2"), -4)]
    assert load.guard.reg == Reg("p")
    assert load.source == "?:7"
    assert move.operands == [Reg("p@1"), Imm(0x3F800000, 32)]
    assert k.labels[inner.operands[0].name] == 2
    assert number.operands[1] == Imm(255)
    assert jump.operands[0].name == "$top"
    assert k.labels["$top"] == 0
    assert load.line == HEADER.count("\n") + 10


def test_unknown_opcode_names_the_line():
    with pytest.raises(UnsupportedInstruction, match=r"line \d+: frobnicate.b32 %r1, %r2") as e:
        run("frobnicate.b32 %r1, %r2;")
    assert "frobnicate" in kernel("frobnicate.b32 %r1, %r2;").split("\n")[e.value.line - 1]


def test_unknown_modifier_is_an_error():
    with pytest.raises(UnsupportedInstruction, match=r"modifier \.bogus"):
        run("add.bogus.s32 %r1, %r2, %r3;")


def test_every_unknown_opcode_is_listed():
    with pytest.raises(UnsupportedInstruction, match="2 instructions") as e:
        run("aaa.b32 %r1;\nbbb.b32 %r1;\naaa.b32 %r1;")
    assert "aaa" in str(e.value)
    assert "bbb" in str(e.value)


def test_not_ptx():
    with pytest.raises(ParseError, match="line 1"):
        parse("int main() {}")


def test_module_variables_are_readable_and_constants_not_writable():
    text = (
        HEADER
        + ".global .align 4 .b8 t[8] = {1, 0, 0, 0, 7, 0, 0, 0};\n"
        + kernel(
            "mov.u64 %d1, t; ld.global.u32 %r1, [t+4]; st.global.u32 [%ptr0], %r1;", [0], threads=1
        ).replace(HEADER, "")
    )
    out = np.zeros(1, np.uint32)
    run_ptx(text, grid=1, args=[out])
    assert out[0] == 7
