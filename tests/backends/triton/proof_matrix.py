"""Which feature was proven where, read off the cases of the tests.

`python tests/backends/triton/proof_matrix.py` writes the table of docs/proof-triton.md; test_proof_matrix.py
holds that it is the one there.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[2] / "docs" / "proof-triton.md"
BEGIN, END = "<!-- written by proof_matrix.py -->\n", "<!-- until here -->\n"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def _decoding(case) -> bool:
    rows = case.lengths[0][0] * case.group
    return not case.packed and rows <= 64 and case.lengths[0][1] >= max(512, 4 * rows)


FEATURES = {
    "no mask": lambda c: not (c.options.get("causal") or c.options.get("window") or c.mask or c.packed),
    "causal": lambda c: c.options.get("causal", False),
    "window": lambda c: "window" in c.options,
    "key mask": lambda c: c.mask is not None,
    "packed sequences": lambda c: c.packed,
    "grouped heads": lambda c: c.group > 1,
    "bias": lambda c: c.bias is not None,
    "gradient of bias": lambda c: "bias" in c.wanted,
    "gradient of a bias that broadcasts": lambda c: "bias" in c.wanted and not all(c.bias),
    "relative_bias": lambda c: c.relative_bias,
    "gradient of relative_bias": lambda c: "relative_bias" in c.wanted,
    "ALiBi": lambda c: c.alibi is not None,
    "softcap": lambda c: "softcap" in c.options,
    "dropout": lambda c: "dropout_p" in c.options,
    "seed on the device": lambda c: torch.is_tensor(c.options.get("seed")),
    "gradient through lse": lambda c: c.use_lse,
    "gradient of k alone": lambda c: c.wanted == ("k",),
    "gradient of v alone": lambda c: c.wanted == ("v",),
    "gradient of q alone": lambda c: c.wanted == ("q",),
    "few queries, many keys": _decoding,
    "head_dim 128": lambda c: c.head_dim == 128,
    "head_dim 256": lambda c: c.head_dim == 256,
    "head_dim no power of two, head_dim_v another": lambda c: (
        c.head_dim & (c.head_dim - 1) and c.head_dim_v != c.head_dim
    ),
    "rows without 16-byte alignment": lambda c: c.layout == "sliced",
}
TF32 = "TF32 (float32_matmul_precision)"
ONLY_BACKWARD = tuple(name for name in FEATURES if name.startswith("gradient"))
ONLY_FORWARD = ("few queries, many keys",)


def places() -> dict[str, list]:
    """The cases that run in the interpreter (I), and as PTX of sm_80 and sm_90 (each in both)."""
    import simulated_cases

    path = HERE / "interpreted" / "test_features.py"
    spec = importlib.util.spec_from_file_location("interpreted_features", path)
    interpreted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(interpreted)
    simulated = [*simulated_cases.QUICK.values(), *simulated_cases.SLOW.values()]
    return {"I": interpreted.every_case(), "80": simulated, "90": simulated}


def _tf32_row() -> str:
    import simulated_cases

    ran = simulated_cases.TF32.values()
    cells = ["80 90" if any(c.wanted or not backward for c in ran) else "–" for backward in (False, True)]
    return f"| {TF32} |  |  |  |  | {' | '.join(cells)} |"


def table() -> str:
    found = places()
    directions = ("forward", "backward")
    lines = [
        f"| | {' | '.join(f'{dtype} {direction}' for dtype in DTYPES for direction in directions)} |",
        f"|{'---|' * (1 + len(DTYPES) * len(directions))}",
    ]
    for name, has in FEATURES.items():
        cells = []
        for dtype in DTYPES.values():
            for direction in directions:
                if name in (ONLY_BACKWARD if direction == "forward" else ONLY_FORWARD):
                    cells.append("")
                    continue
                cells.append(
                    " ".join(
                        place
                        for place, cases in found.items()
                        if any(
                            c.dtype == dtype and has(c) and (c.wanted or direction == "forward")
                            for c in cases
                        )
                    )
                    or "–"
                )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, _tf32_row()]) + "\n"


def documented() -> str:
    return DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parents[1]))
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(text.replace(documented(), table()), encoding="utf-8")
