"""The report as one HTML file: figures inside as PNG, no script, nothing fetched."""

from __future__ import annotations

import base64
from html import escape

from fastattn.finetune import plots
from fastattn.finetune.tables import Section, as_text, sections, title

__all__ = ["page"]

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1e293b; background: #f8fafc; margin: 0; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 2.5rem 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p { margin: .5rem 0; }
img { max-width: 100%; height: auto; margin: .75rem 0; background: white; border: 1px solid #e2e8f0;
  border-radius: .5rem; }
table { border-collapse: collapse; margin: .75rem 0; font-size: .9rem; background: white; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem; border-bottom: 1px solid #e2e8f0; }
th { border-bottom: 2px solid #cbd5e1; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; }
.tile { background: white; border: 1px solid #e2e8f0; border-radius: .5rem; padding: .75rem 1rem; }
.tile b { display: block; font-size: 1.7rem; color: #0f766e; }
.tile span { font-size: .85rem; color: #475569; }
.scroll { overflow-x: auto; }
"""


def page(reports: list[dict]) -> str:
    body = "\n".join(_run(report) for report in reports)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<style>{STYLE}</style>\n<title>fastattn: {escape(title(reports[0]))}</title>"
    return (
        f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _run(report: dict) -> str:
    parts = [f"<h1>{escape(title(report))}</h1>", _tiles(report)]
    parts += [_section(section, report) for section in sections(report)]
    return "\n".join(parts)


def _tiles(report: dict) -> str:
    """The few figures that one looks for first."""
    compared, test = report["comparison"] or {}, report["test"]
    tiles = []
    for key, name in (("train_mode", "as trained"), ("dropout_off", "dropout off")):
        passed = compared.get(key, {})
        if "speedup" in passed:
            tiles.append((f"{passed['speedup']:.2f}×", f"as fast as {passed['faster_arm']}, {name}"))
    ratio = compared.get("dropout_off", {}).get("saved_bytes_ratio")
    if ratio is not None:
        tiles.append((f"{ratio:.2f}×", "the bytes saved for backward, dropout off"))
    differences = compared.get("dropout_off", {}).get("loss_difference")
    if differences:
        tiles.append((f"{max(differences.values()):.0e}", "largest relative loss difference, dropout off"))
    if test and "perplexity" in test:
        tiles.append((f"{test['perplexity']:.1f}", f"perplexity on {test['texts']:,} held-out texts"))
    elif test:
        tiles.append((f"{test['accuracy']:.1%}", f"accuracy on {test['texts']:,} held-out texts"))
    inner = "".join(
        f"<div class=tile><b>{escape(value)}</b><span>{escape(text)}</span></div>" for value, text in tiles
    )
    return f"<div class=tiles>{inner}</div>"


def _section(section: Section, report: dict) -> str:
    parts = [f"<h2>{escape(section.heading)}</h2>", *(f"<p>{escape(text)}</p>" for text in section.text)]
    if section.figure:
        parts.append(_figure(section.figure, report))
    if section.rows:
        parts.append(_table(section.rows))
    return "\n".join(parts)


def _figure(name: str, report: dict) -> str:
    if name == "losses":
        png, words = plots.losses(report), "loss by step"
    elif name == "costs":
        png, words = plots.costs(report["comparison"]), "time, throughput and memory of every arm"
    else:
        png, words = plots.confusion_matrix(report["test"]), "confusion matrix"
    return f'<img alt="{words}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _table(rows: list[list]) -> str:
    header = "".join(f"<th>{escape(as_text(cell))}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows[1:])
    return f"<div class=scroll><table><tr>{header}</tr>{body}</table></div>"


def _cell(cell) -> str:
    text = as_text(cell)
    kind = " class=number" if text and not text.strip("0123456789.,-") else ""
    return f"<td{kind}>{escape(text)}</td>"
