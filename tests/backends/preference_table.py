"""The table of docs/performance-cuda.md that says which backend comes first.

Run as a script this file writes it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from fastattn.backends.preference import FIGURES, Slots, cuda_first
from fastattn.problem import AttentionInputs, AttentionOptions, describe

DOCUMENT = Path(__file__).parents[2] / "docs" / "performance-cuda.md"
BEGIN, END = "<!-- written by preference_table.py -->\n", "<!-- until here -->\n"


def first(capability: int, dim: int, scores: str, rows: int, need_grad: bool) -> str:
    q = torch.empty(1, 1, rows, dim, dtype=torch.float16)
    seed = torch.zeros((), dtype=torch.int64) if scores == "dropout" else None
    numbers = (30.0 if scores == "softcap" else 0.0, 0.1 if scores == "dropout" else 0.0)
    options = AttentionOptions(False, 0.1, -1, -1, *numbers, 0, 0)
    problem = describe(AttentionInputs(q, q, q, seed=seed), options, need_grad)
    return "cuda" if cuda_first(problem, capability) else "triton"


def _in_words(slots: Slots) -> str:
    forward = f"{slots.forward:.2f}" + (f" (+{slots.moving:.2f})" if slots.moving else "")
    rest = (f"{figure:.2f}" if figure is not None else "–" for figure in (slots.dq, slots.dkdv))
    return " / ".join((forward, *rest))


def table() -> str:
    lines = ["| | D | scores | Triton | CUDA C++ | inference | training |", f"|{'---|' * 7}"]
    for (capability, dim, scores), (triton, cuda) in FIGURES.items():
        choices = []
        for need_grad in (False, True):
            long, short = (first(capability, dim, scores, rows, need_grad) for rows in (512, 128))
            choices.append(long if long == short else f"{long}, {short} below 512 keys")
        cells = (f"sm_{capability}", str(dim), scores, _in_words(triton), _in_words(cuda), *choices)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def documented() -> str:
    return DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


if __name__ == "__main__":
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(text.replace(documented(), table()), encoding="utf-8")
