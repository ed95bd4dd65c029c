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

import machine_code
import pytest

ROOT = Path(__file__).parents[3]
TABLE = Path(__file__).with_name("main_loops.json")
SOURCE = """
#include "cuda/sm80/instance.h"
namespace fastattn {{ extern const KernelSet kernels = kernel_set<{type}, {dim}, {features}>(1); }}
"""
HOPPER_SOURCE = """
#include "cuda/sm90/instance.h"
namespace fastattn::sm90 {{
extern const Kernel kernels[] = {{forward_kernel<{type}, {dim}>(), query_gradient_kernel<{type}, {dim}>(),
                                 {key_gradients}}};
}}
"""
HOPPER_BACKWARD = (
    "key_gradient_kernel<{type}, {dim}, true, true>()",  # up to head dimension 128; above, each of its own
    "key_gradient_kernel<{type}, {dim}, true, false>(), key_gradient_kernel<{type}, {dim}, false, true>()",
)
# What a warp multiplies in a step: (matmuls, rows, columns, head_dim) of the tiles in tile_sizes.h, and the
# most issue slots per tensor cycle: for plain at 64 and 128 fewer than FlashAttention-2's binaries need.
CASES = {
    "Half 32 0": {
        "forward": (2, 32, 64, 32, 0.83),
        "key_gradient": (4, 16, 64, 32, 0.58),
        "query_gradient": (3, 16, 64, 32, 0.56),
    },
    "Half 64 0": {
        "forward": (2, 32, 64, 64, 0.51),
        "key_gradient": (4, 16, 64, 64, 0.39),
        "query_gradient": (3, 16, 64, 64, 0.38),
    },
    "Half 96 0": {
        "forward": (2, 16, 64, 96, 0.44),
        "key_gradient": (4, 16, 32, 96, 0.38),
        "query_gradient": (3, 16, 32, 96, 0.34),
    },
    "Half 128 0": {
        "forward": (2, 16, 64, 128, 0.38),
        "key_gradient": (4, 16, 32, 128, 0.33),
        "query_gradient": (3, 16, 32, 128, 0.30),
    },
    "Half 256 0": {
        "forward": (2, 16, 32, 256, 0.34),
        "key_gradient dk": (3, 16, 16, 256, 0.37),
        "key_gradient dv": (2, 16, 16, 256, 0.40),
        "query_gradient": (3, 16, 16, 256, 0.32),
    },
    "Half 64 16": {
        "forward": (2, 16, 64, 64, 1.36),
        "key_gradient": (4, 16, 64, 64, 0.63),
        "query_gradient": (3, 16, 64, 64, 0.91),
    },
    "Half 128 16": {
        "forward": (2, 16, 64, 128, 0.78),
        "key_gradient": (4, 16, 32, 128, 0.50),
        "query_gradient": (3, 16, 32, 128, 0.79),
    },
    "Half 64 1": {
        "forward": (2, 16, 64, 64, 1.00),
        "key_gradient": (4, 16, 64, 64, 0.64),
        "query_gradient": (3, 16, 64, 64, 0.72),
    },
    "Half 128 1": {
        "forward": (2, 16, 64, 128, 0.60),
        "key_gradient": (4, 16, 32, 128, 0.46),
        "query_gradient": (3, 16, 32, 128, 0.47),
    },
}
# What a warpgroup multiplies in a step, (columns, summed) of each product; the most issue slots per tensor
# cycle.
HOPPER_CASES = {
    "sm_90a Half 64": {
        "forward": (((128, 64), (64, 128)), 0.75),
        "key_gradient": (((64, 64),) * 4, 0.49),
        "query_gradient": (((128, 64), (128, 64), (64, 128)), 0.51),
    },
    "sm_90a Half 128": {
        "forward": (((128, 128), (128, 128)), 0.39),
        "key_gradient": (((64, 128), (64, 128), (128, 64), (128, 64)), 0.28),
        "query_gradient": (((64, 128), (64, 128), (128, 64)), 0.35),
    },
    "sm_90a Half 256": {
        "forward": (((64, 256), (256, 64)), 0.28),
        "key_gradient dk": (((64, 256), (64, 256), (256, 64)), 0.26),
        "key_gradient dv": (((64, 256), (256, 64)), 0.22),
        "query_gradient": (((64, 256), (64, 256), (256, 64)), 0.25),
    },
    "sm_90a BFloat16 128": {"forward": (((128, 128), (128, 128)), 0.39)},
}
# The sm_80 kernels as a Hopper device gets them, from PTX: what test_hopper_choice.py compares with.
RIVALS = ("sm_90 Half 32 0", "sm_90 Half 96 0", "sm_90 Half 256 0")


def compile_cubin(folder: Path, instance: str) -> tuple[bytes, str, int]:
    """The machine code, what ptxas said, and the architecture it is for."""
    hopper = instance.startswith("sm_90a")
    type_, dim, features = re.sub("^sm_90a? ", "", instance).split() + [""] * hopper
    target = {"sm_90a": "-arch=sm_90a", "sm_90": "-gencode=arch=compute_80,code=sm_90"}
    source, cubin = folder / "instance.cu", folder / "instance.cubin"
    text = HOPPER_SOURCE.replace("{key_gradients}", HOPPER_BACKWARD[int(dim) > 128]) if hopper else SOURCE
    source.write_text(text.format(type=type_, dim=dim, features=features))
    flags = ["-std=c++17", "-O3", target.get(instance.split()[0], "-arch=sm_80"), "-Xptxas", "-v"]
    command = ["nvcc", *flags, f"-I{ROOT / 'csrc'}", "-cubin", "-o", cubin, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "C7519" not in done.stderr, "a product without a fence of its own: ptxas has put one in"
    return cubin.read_bytes(), done.stderr, 90 if instance.startswith("sm_90") else 80


def statistics(folder: Path, instance: str) -> dict[str, dict]:
    """For each kernel: spilled bytes, registers, and the loop over unmasked tiles."""
    from fastattn.backends.triton import sass

    cubin, log, arch = compile_cubin(folder, instance)
    found = {}
    for part in re.split(r"Compiling entry function", log)[1:]:
        name = kernel_name(part)
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
        found[name] = {"spilled_bytes": spills, "registers": int(re.search(r"Used (\d+) registers", part)[1])}
    for part in re.split(r"(?=^\.text\.)", sass.disassemble(cubin), flags=re.M)[1:]:
        kernel = found[kernel_name(part)]
        kernel["main_loop"] = sass.main_loop(part, arch).as_dict()
        assert len(main_loop_text(part)) == kernel["main_loop"]["instructions"], "two different loops"
        if kernel_name(part) == "forward":
            kernel["jumped_over"] = jumped_over(part)
        loop = main_loop_text(part)
        kernel["shared_cycles"] = sum(map(shared_cycles, loop))
        if "UTMALDG" in part:
            kernel["tensor_loads"] = part.count("UTMALDG")
            last_wait = max(at for at, text in enumerate(loop) if "WARPGROUP.DEPBAR" in text)
            kernel["producer_registers"] = producer_registers(part)
            kernel["exponentials_late"] = sum("MUFU.EX2" in text for text in loop[last_wait:])
    return found


def shared_cycles(instruction: str) -> float:
    """Cycles in which a matrix instruction's operands are read from shared memory, 128 bytes each.

    For ldmatrix, of a warp's quarter of them; wgmma is issued by the four warps together.
    """
    if "LDSM" in instruction:
        return 4 * 512 / 128
    if product := re.search(r"HGMMA\.64x(\d+)x16\S* R\d+, (gdesc|R)", instruction):
        return 16 * 2 * (int(product[1]) + (64 if product[2] == "gdesc" else 0)) / 128
    return 0


def jumped_over(text: str) -> int:
    """Instructions of the main loop that a step jumps over unless a softmax base moves.

    They are the blocks with the reduction over a quad and with the products that rescale.
    """
    loop = main_loop_text(text, labels := {})
    count = 0
    for at, instruction in enumerate(loop):
        target = re.search(r"BRA.*(\.L_x_\d+)", instruction)
        end = labels.get(target[1], 0) if target else 0
        if end > at and re.search(r"SHFL|FMUL", " ".join(loop[at:end])):
            count += end - at - 1
    return count


def main_loop_text(text: str, labels: dict[str, int] | None = None) -> list[str]:
    """Instructions of the shortest loop with matrix instructions; `labels` receives where its labels are."""
    instructions, found = read(text)
    target = {at: re.search(r"BRA.*(\.L_x_\d+)", text) for at, text in enumerate(instructions)}
    loops = [
        (found[label[1]], at + 1)
        for at, label in target.items()
        if label
        and found[label[1]] <= at
        and re.search(r"HG?MMA", " ".join(instructions[found[label[1]] : at]))
    ]
    start, end = min(loops, key=lambda loop: loop[1] - loop[0])
    if labels is not None:
        labels.update({name: at - start for name, at in found.items() if start <= at <= end})
    return instructions[start:end]


def read(text: str) -> tuple[list[str], dict[str, int]]:
    """The instructions of a kernel, and where its labels are among them."""
    instructions, labels = [], {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*);", line):
            instructions.append(instruction[1])
    return instructions, labels


def producer_registers(text: str) -> int:
    """Registers used by what can be reached from where the producer's warpgroup gives the others back."""
    instructions, labels = read(text)
    todo = [at for at, instruction in enumerate(instructions) if "USETMAXREG.DEALLOC" in instruction]
    reached = set()
    while todo:
        at = todo.pop()
        if at in reached:
            continue
        reached.add(at)
        if target := re.search(r"\.L_x_\d+", instructions[at]):
            todo.append(labels[target[0]])
        if not re.match(r"(EXIT|BRA(\.\w+)* `)", instructions[at]):  # both may be conditional
            todo.append(at + 1)
    return 1 + max(int(r) for at in reached for r in re.findall(r"\bR(\d+)\b", instructions[at]))


def kernel_name(text: str) -> str:
    """Such as "forward", "key_gradient", or "key_gradient dk" of a kernel that computes one of the two."""
    return machine_code.in_words(re.search(r"_ZN8fastattn\w+", text)[0]).split()[1].replace("_d", " d")


def hold_to_the_table(instance: str, found: dict) -> None:
    expected = json.loads(TABLE.read_text())[instance]
    assert json.loads(json.dumps(found)) == expected, "changed; if that is meant, write main_loops.json anew"


@pytest.mark.parametrize("instance", [pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_machine_code(tmp_path, instance):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    pytest.importorskip("triton", reason="Triton's wheel has the disassembler")
    found = statistics(tmp_path, instance)
    hold_to_the_table(instance, found)
    for kernel, (matmuls, rows, columns, dim, most) in CASES[instance].items():
        loop = found[kernel]["main_loop"]
        assert loop["matrix_instructions"] == matmuls * (rows // 16) * (columns // 8) * (dim // 16)
        assert all(kind.startswith("HMMA.16816.F32") for kind in loop["matrix_kinds"])
        assert loop["spills"] == 0
        assert found[kernel]["spilled_bytes"] == 0, kernel
        slots = loop["instructions"] - found[kernel].get("jumped_over", 0)
        assert slots / loop["tensor_cycles"] <= most, kernel


@pytest.mark.parametrize("instance", [pytest.param(name, marks=pytest.mark.slow) for name in HOPPER_CASES])
def test_hopper_machine_code(tmp_path, instance):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    pytest.importorskip("triton", reason="Triton's wheel has the disassembler")
    found = statistics(tmp_path, instance)
    hold_to_the_table(instance, found)
    for name, (products, most) in HOPPER_CASES[instance].items():
        kernel, loop = found[name], found[name]["main_loop"]
        assert loop["matrix_instructions"] == sum(summed // 16 for _, summed in products)
        assert loop["tensor_cycles"] == sum(64 * columns * summed / 4 / 512 for columns, summed in products)
        assert all(kind.startswith("HGMMA.64x") for kind in loop["matrix_kinds"])
        assert kernel["spilled_bytes"] == loop["spills"] == 0, name
        assert kernel["tensor_loads"] > 0
        assert kernel["producer_registers"] <= 24, "what setmaxnreg leaves to the producer"
        if name != "key_gradient dv":  # whose one product per step waits for them
            assert kernel["exponentials_late"] <= 2, f"{name}: exponentials belong where products run"
        slots = loop["instructions"] - kernel.get("jumped_over", 0)
        assert slots / loop["tensor_cycles"] <= most, name


if __name__ == "__main__":
    import tempfile

    table = {}
    for instance in (*CASES, *HOPPER_CASES, *RIVALS):
        with tempfile.TemporaryDirectory() as folder:
            table[instance] = statistics(Path(folder), instance)
    json.dump(table, sys.stdout, indent=1)
