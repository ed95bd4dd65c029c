"""What the main loop of a compiled NVIDIA kernel costs, counted from its SASS: a model, not a measurement.

Per warp and iteration the model adds up the cycles each unit of an SM sub-partition needs at its data-sheet
rate: tensor cores, MUFU (exponentials), FP32 and integer pipes, and one issue slot per instruction. The
largest is the bound the loop can't beat. Latency, bank conflicts, occupancy and memory are outside it.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

_FP32_CYCLES = {80: 2, 86: 1, 89: 1, 90: 1, 100: 1, 120: 1}
_MATRIX = ("HMMA", "HGMMA", "UTCHMMA", "QMMA", "IMMA", "UTCQMMA")
_FP32 = ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "FMNMX3")
_ALU = (
    "FMNMX",
    "FSEL",
    "FSETP",
    "SEL",
    "ISETP",
    "LOP3",
    "PLOP3",
    "PRMT",
    "SHF",
    "IADD3",
    "LEA",
    "F2FP",
    "IMNMX",
    "MOV",
)
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Za-z0-9_.]+)(.*);")
_LABEL = re.compile(r"^(\.L_x_\d+):")


@dataclass(frozen=True)
class LoopCost:
    """Instructions, and cycles per warp and iteration, of one loop."""

    instructions: int
    matrix_instructions: int
    matrix_kinds: tuple[str, ...]
    exponentials: int
    spills: int
    tensor_cycles: float
    mufu_cycles: float
    fp32_cycles: float
    alu_cycles: float

    @property
    def issue_per_tensor(self) -> float:
        """Issue slots per tensor cycle: below 1 the tensor cores could be kept busy."""
        return self.instructions / self.tensor_cycles

    def as_dict(self) -> dict:
        return asdict(self) | {"issue_per_tensor": round(self.issue_per_tensor, 3)}


def disassemble(cubin: bytes) -> str:
    """nvdisasm's text of a cubin, by the copy that Triton ships."""
    return _run_on_file("nvdisasm", ["-c"], cubin)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack (bytes a thread spills to) and static shared memory, as cuobjdump reports them."""
    text = _run_on_file("cuobjdump", ["-res-usage"], cubin)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return {
        "registers": found["REG"],
        "stack": found["STACK"] + found["LOCAL"],
        "static_shared": found["SHARED"],
    }


def _run_on_file(tool: str, options: list[str], cubin: bytes) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [os.fspath(path), *options, os.fspath(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def matrix_loops(sass: str, arch: int) -> list[LoopCost]:
    """The innermost loops that hold matrix instructions, in the order of the code."""
    opcodes: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif instruction := _INSTRUCTION.match(line):
            opcode, operands = instruction[2], instruction[3]
            target = re.search(r"\.L_x_\d+", operands)
            if opcode.startswith("BRA") and target and target[0] in labels:
                loops.append((labels[target[0]], len(opcodes) + 1))
            opcodes.append((opcode, operands))
    with_matrix = [span for span in loops if any(_base(op) in _MATRIX for op, _ in opcodes[slice(*span)])]
    innermost = [
        (a, b)
        for a, b in with_matrix
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in with_matrix)
    ]
    return [_cost(opcodes[a:b], arch) for a, b in innermost]


def main_loop(sass: str, arch: int) -> LoopCost | None:
    """The unmasked loop.

    Of those holding matrix instructions, the one with the fewest instructions for each.
    """
    loops = matrix_loops(sass, arch)
    return min(loops, key=lambda loop: loop.issue_per_tensor) if loops else None


def _base(opcode: str) -> str:
    return opcode.split(".")[0]


def _cost(instructions: list[tuple[str, str]], arch: int) -> LoopCost:
    names = [op for op, _ in instructions]
    count = Counter(_base(op) for op in names)
    matrix = [op for op in names if _base(op) in _MATRIX]
    return LoopCost(
        instructions=len(names),
        matrix_instructions=len(matrix),
        matrix_kinds=tuple(sorted(set(matrix))),
        exponentials=sum(op.startswith("MUFU.EX2") for op in names),
        spills=count["LDL"] + count["STL"],
        tensor_cycles=sum(_tensor_cycles(op) for op in matrix),
        mufu_cycles=8 * count["MUFU"],
        fp32_cycles=_FP32_CYCLES.get(arch, 1) * sum(count[op] for op in _FP32),
        alu_cycles=2 * sum(count[op] for op in _ALU),
    )


def _tensor_cycles(opcode: str) -> float:
    """Cycles of one warp's share of a matrix instruction.

    16x8x16 takes 8 on sm_80; wgmma does 512 FMA a cycle.
    """
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", opcode)
    if _base(opcode) == "HGMMA" and shape:
        m, n, k = map(int, shape.groups())
        return m * n * k / 4 / 512
    small = re.search(r"\.(16)(8)(16|8)\b", opcode) or re.search(r"\.(16)(8)(4)\b", opcode)
    fma = int(small[1]) * int(small[2]) * int(small[3]) if small else 2048
    tf32 = 2 if "TF32" in opcode else 1
    return 8.0 * fma * tf32 / 2048


def matrix_count(sass: str) -> dict[str, int]:
    """Matrix instructions of the whole kernel by opcode."""
    opcodes = (match[2] for line in sass.splitlines() if (match := _INSTRUCTION.match(line)))
    return dict(Counter(opcode for opcode in opcodes if _base(opcode) in _MATRIX))
