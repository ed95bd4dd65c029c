"""report.json, report.md and a self-contained report.html of one run, or of several in one folder."""

from __future__ import annotations

import json
from pathlib import Path

from fastattn.finetune import files
from fastattn.finetune.errors import UserInputError
from fastattn.finetune.html import page
from fastattn.finetune.tables import as_text, feature_costs, sections, title

__all__ = ["read", "summary", "write"]


def write(directory: Path, reports: list[dict]) -> None:
    """All three files. A folder of several runs has {"runs": [...]} in report.json."""
    whole = reports[0] if len(reports) == 1 else {"runs": reports}
    files.write_json(directory / "report.json", whole)
    files.write_bytes(directory / "report.md", _markdown(reports).encode())
    files.write_bytes(directory / "report.html", page(reports).encode())


def read(directory: Path) -> dict:
    try:
        return json.loads((directory / "report.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserInputError(f"{directory} has no readable report.json") from error


def summary(reports: list[dict]) -> str:
    """A few lines for the terminal."""
    lines = []
    for report in reports:
        lines.append(f"\n{title(report)}")
        if report["settings"]["feature_cache"] and report["training"]:
            lines.append(f"  {feature_costs(report)}")
        test, compared = report["test"], report["comparison"] or {}
        if test and "perplexity" in test:
            lines.append(
                f"  test loss {test['loss']:.3f} a token, perplexity {test['perplexity']:.1f} on "
                f"{test['texts']:,} texts (guessing by frequency: loss {test['frequency_loss']:.3f})"
            )
        elif test:
            lines.append(
                f"  test accuracy {test['accuracy']:.1%}, macro F1 {test['macro_f1']:.3f} on "
                f"{test['texts']:,} texts (always the largest class: {test['majority_class']:.1%})"
            )
        for key, name in (("train_mode", "as trained"), ("dropout_off", "dropout off")):
            passed = compared.get(key, {})
            if "speedup" in passed:
                ratio = passed["saved_bytes_ratio"]
                saved = f", saved bytes ×{ratio:.2f}" if ratio is not None else ""
                lines.append(
                    f"  {name}: {passed['speedup']:.2f}× the speed of {passed['faster_arm']}{saved}, "
                    f"largest loss difference {max(passed['loss_difference'].values()):.1e}"
                    + (" (each arm draws its own dropout)" if key == "train_mode" else "")
                )
        check = report["plain_transformers"]
        if check and "loss" in check:
            lines.append(
                f"  plain transformers, without fastattn: loss {check['loss']:.4f} on {check['texts']} texts "
                f"({check['loss_here']:.4f} here)"
            )
        elif check:
            lines.append(
                f"  plain transformers, without fastattn: {check['accuracy']:.1%} on {check['texts']} texts "
                f"({check['accuracy_here']:.1%} here, {check['different_labels']} labels differ)"
            )
    return "\n".join(lines)


def _markdown(reports: list[dict]) -> str:
    parts = []
    for report in reports:
        parts.append(f"# {title(report)}\n")
        for section in sections(report):
            parts.append(f"## {section.heading}\n")
            parts.extend(f"{text}\n" for text in section.text)
            if section.rows:
                header, *rows = [[as_text(cell).replace("|", "\\|") for cell in row] for row in section.rows]
                lines = [header, ["---"] * len(header), *rows]
                parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n")
    return "\n".join(parts)
