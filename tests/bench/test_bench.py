"""`fastattn bench` counts right, keeps its contenders equal, and reports what it measured."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from fastattn.bench import contenders
from fastattn.bench.grid import MASKS, Cell, Inputs
from fastattn.bench.timing import interleaved_medians
from fastattn.cli import main


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_contenders_compute_the_same(name, mask):
    inputs = Inputs(Cell(2, 3, 20, 16, mask, "float32", "forward"))
    reference = contenders._fastattn(inputs, "reference")()
    torch.testing.assert_close(
        {"sdpa": contenders._sdpa, "eager": contenders._eager}[name](inputs)(), reference
    )


def test_flops_are_those_of_visible_pairs():
    full = Cell(2, 3, 8, 16, "full", "float32", "forward")
    assert full.flops == 2 * 3 * (2 * 8 * 8 * 16) * 2
    visible = torch.ones(8, 8).tril().sum().item() / 64
    assert Cell(2, 3, 8, 16, "causal", "float32", "forward").flops == full.flops * visible
    inputs = Inputs(Cell(2, 3, 8, 16, "padded", "float32", "forward"))
    assert inputs.cell.visible == inputs.key_mask.float().mean().item()
    assert Cell(2, 3, 8, 16, "full", "float32", "forward+backward").flops == 3.5 * full.flops


def test_contenders_take_turns():
    order = []
    steps = {"a": lambda: order.append("a") or torch.ones(1 << 20).sum(), "b": lambda: order.append("b")}
    medians = interleaved_medians(steps, seconds=0.0)
    assert set(medians) == {"a", "b"}
    assert min(medians.values()) > 0
    rounds = "".join(order).rstrip("b")
    assert rounds.count("ba") >= 3, "a runs again only after b"


def test_command_writes_what_it_measured(tmp_path, capsys):
    arguments = ["--backend", "reference", "--shape", "1,2,9,8", "--against", "sdpa", "--seconds", "0"]
    assert main(["bench", *arguments, "--dtype", "float32", "--out", str(tmp_path)]) == 0
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 2  # contenders, masks, passes
    for row in rows:
        flops = float(row["gflops"]) * float(row["milliseconds"]) * 1e6
        cell = Cell(1, 2, 9, 8, row["mask"], "float32", row["direction"])
        assert flops == pytest.approx(cell.flops)
    report = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert report["rows"][0]["contender"] == "fastattn"
    assert {"command", "machine", "versions", "peak"} <= set(report)
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert "sdpa" in capsys.readouterr().out


@pytest.mark.parametrize(
    "bad", [["--shape", "1,2,3"], ["--dtype", "int8"], ["--against", "none"], ["--threads", "0"]]
)
def test_bad_arguments_end_with_one_sentence(bad, capsys):
    assert main(["bench", *bad]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert bad[0] in error
