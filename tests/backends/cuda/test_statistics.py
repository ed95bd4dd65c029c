"""What nvcc made of the kernels: no spills, a matrix instruction for each product, the table's main loops.

The table is checked in so that a change shows in a diff. Run as a script (PYTHONPATH=.) this file prints it.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TABLE = Path(__file__).with_name("main_loops.json")
SOURCE = """
#include "cuda/sm80/instance.h"
namespace fastattn {{ extern const KernelSet kernels = kernel_set<{type}, {dim}, {features}>(1); }}
"""
# What a warp multiplies in a step: (matmuls, rows, columns, head_dim) of the tiles in tile_sizes.h.
CASES = {
    "Half 64 0": {
        "forward": (2, 32, 64, 64),
        "key_gradient": (4, 16, 64, 64),
        "query_gradient": (3, 16, 64, 64),
    },
    "Half 128 0": {
        "forward": (2, 16, 64, 128),
        "key_gradient": (4, 16, 32, 128),
        "query_gradient": (3, 16, 32, 128),
    },
}


def compile_cubin(folder: Path, instance: str) -> tuple[bytes, str]:
    """The machine code for sm_80, and what ptxas said."""
    type_, dim, features = instance.split()
    source, cubin = folder / "instance.cu", folder / "instance.cubin"
    source.write_text(SOURCE.format(type=type_, dim=dim, features=features))
    command = ["nvcc", "-std=c++17", "-O3", "-arch=sm_80", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run([*command, "-cubin", "-o", cubin, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cubin.read_bytes(), done.stderr


def statistics(folder: Path, instance: str) -> dict[str, dict]:
    """For each kernel: spilled bytes, registers, and the loop over unmasked tiles."""
    from fastattn.backends.triton import sass

    cubin, log = compile_cubin(folder, instance)
    found = {}
    for part in re.split(r"Compiling entry function", log)[1:]:
        name = kernel_name(part)
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        found[name] = {"spilled_bytes": spills, "registers": int(re.search(r"Used (\d+) registers", part)[1])}
    for part in re.split(r"(?=^\.text\.)", sass.disassemble(cubin), flags=re.M)[1:]:
        kernel = found[kernel_name(part)]
        kernel["main_loop"] = sass.main_loop(part, 80).as_dict()
        if kernel_name(part) == "forward":
            kernel["jumped_over"] = jumped_over(part)
    return found


def jumped_over(text: str) -> int:
    """Instructions of the main loop that a step jumps over unless a softmax base moves.

    They lie between the vote on it and where the jump lands.
    """
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*);", line):
            instructions.append(instruction[1])
    target = {at: re.search(r"BRA.*(\.L_x_\d+)", text) for at, text in enumerate(instructions)}
    target = {at: labels[found[1]] for at, found in target.items() if found}
    loops = [
        (end, at)
        for at, end in target.items()
        if end <= at and any("HMMA" in instruction for instruction in instructions[end:at])
    ]
    start, end = min(loops, key=lambda loop: loop[1] - loop[0])
    votes = [at for at in range(start, end) if "VOTE" in instructions[at]]
    jumps = [at for at in target if votes and votes[0] < at < target[at] <= end]
    return target[jumps[0]] - jumps[0] - 1 if jumps else 0


def kernel_name(text: str) -> str:
    return re.search(r"fastattn\d+(forward|key_gradient|query_gradient|score_gradient)", text)[1]


@pytest.mark.parametrize("instance", [pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_machine_code(tmp_path, instance):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    pytest.importorskip("triton", reason="Triton's wheel has the disassembler")
    found = statistics(tmp_path, instance)
    expected = json.loads(TABLE.read_text())[instance]
    for kernel, (matmuls, rows, columns, dim) in CASES[instance].items():
        loop = found[kernel]["main_loop"]
        assert loop["matrix_instructions"] == matmuls * (rows // 16) * (columns // 8) * (dim // 16)
        assert all(kind.startswith("HMMA.16816.F32") for kind in loop["matrix_kinds"])
        assert found[kernel]["spilled_bytes"] == 0, kernel
        assert loop["spills"] == 0
        if kernel == "forward":  # the issue slots that FlashAttention-2's binaries need, by the same count
            slots = loop["instructions"] - found[kernel]["jumped_over"]
            assert slots / loop["tensor_cycles"] <= {64: 0.55, 128: 0.43}[dim]
        assert loop["instructions"] == expected[kernel]["main_loop"]["instructions"], (
            f"{kernel}: the loop changed; if that is meant, write main_loops.json anew"
        )


if __name__ == "__main__":
    import tempfile

    table = {}
    for instance in CASES:
        with tempfile.TemporaryDirectory() as folder:
            table[instance] = statistics(Path(folder), instance)
    json.dump(table, sys.stdout, indent=1)
