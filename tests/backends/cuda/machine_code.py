"""What is in a library's machine code, kernel by kernel. Triton's wheel has the tools."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

TYPES = {"NS_4Half": "f16", "NS_8BFloat16": "bf16", "f": "f32"}
VARIANTS = {1: "softcap", 2: "bias", 4: "relative", 8: "alibi", 16: "dropout"}  # kFeature... of params.h
_KERNEL = re.compile(
    r"_ZN8fastattn(4sm90)?\d+(\w+?_gradient|forward)I(NS_4Half|NS_8BFloat16|NS0?_\w+?|f)E?Li(\d+)E"
)


class Kernel(NamedTuple):
    """One kernel's name in words, and counts of its instructions."""

    name: str
    """ "sm80 forward f16 64 plain", "sm90 key_gradient bf16 128", or the function's of auxiliary.cu."""
    matrix_kinds: frozenset[str]
    matrix_loops: int
    spills: int
    """Loads and stores of local memory."""
    main_loop: int | None
    """Instructions of the loop over unmasked tiles."""


def tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def kernels(library: Path, folder: Path) -> list[Kernel]:
    """All of them; `folder` is for intermediate files."""
    from fastattn.backends.triton import sass

    subprocess.run([tool("cuobjdump"), "-xelf", "all", library], cwd=folder, capture_output=True, check=True)
    found = []
    for cubin in sorted(folder.glob("*.cubin")):
        text = subprocess.run(
            [tool("nvdisasm"), "-c", cubin], capture_output=True, text=True, check=True
        ).stdout
        for part in re.split(r"(?=^\.text\.)", text, flags=re.M)[1:]:
            arch = 90 if "sm_90" in cubin.name else 80
            loops, main = sass.matrix_loops(part, arch), sass.main_loop(part, arch)
            found.append(
                Kernel(
                    in_words(re.match(r"\.text\.(\S+):", part)[1]),
                    frozenset(sass.matrix_count(part)),
                    len(loops),
                    len(re.findall(r"\b(?:LDL|STL)\b", part)),
                    main and main.instructions,
                )
            )
    return found


def in_words(symbol: str) -> str:
    found = _KERNEL.match(symbol)
    if found is None:
        return re.sub(r"_ZN8fastattn(\d+_GLOBAL__N_\w+?_auxiliary_cu_\w{8})?\d+", "", symbol)
    hopper, kernel, type_, dim = found.groups()
    rest = symbol[found.end() :]
    if kernel == "key_gradient":  # template <..., bool kWantDk, bool kWantDv>
        wanted = re.search(r"Lb(\d)ELb(\d)E", rest)
        kernel += {"11": "", "10": "_dk", "01": "_dv"}["".join(wanted.groups())]
    words = ["sm90" if hopper else "sm80", kernel, TYPES[type_], dim]
    return " ".join(words if hopper else [*words, _variant(int(re.search(r"VariantILj(\d+)E", rest)[1]))])


def _variant(features: int) -> str:
    if features in (0, 31):
        return "all" if features else "plain"
    return next(name for bit, name in VARIANTS.items() if features & bit)
