"""`fastattn bench` counts right, keeps its contenders equal, and reports what it measured."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from fastattn.bench import contenders, features, peak, phases, ratios
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


@pytest.mark.parametrize("feature", features.FEATURES)
def test_features_are_those_of_their_names(feature):
    """Both take the same numbers and, but for dropout, compute the same of them."""
    ours, taken, theirs, padded = features.problem(feature, (3, 8, 20, 16), "float32", "reference")
    found, expected = ours(*taken), theirs(*padded)
    assert padded[1].shape[1] == (2 if feature in ("grouped", "decode") else 8)
    assert padded[0].shape[2] == (1 if feature == "decode" else 20)
    if feature == "dropout":
        assert not torch.equal(found, ours(*taken))
        assert not torch.equal(expected, theirs(*padded))
        return
    if feature == "packed":
        tokens = theirs.keywords["attn_mask"][:, 0, 0]
        assert tokens.sum(1).tolist() == [10, 15, 20]
        expected = expected.transpose(1, 2)[tokens]
    torch.testing.assert_close(found, expected)


def test_features_of_one_problem(tmp_path, cpu):
    arguments = ["--parts", "features", "--backend", "cpu", "--shape", "2,4,24,16", "--seconds", "0"]
    assert main(["bench", *arguments, "--dtype", "float32", "--out", str(tmp_path)]) == 0
    with (tmp_path / "features.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    both = [(name, way) for name in features.FEATURES for way in ("forward", "forward+backward")]
    assert [(row["feature"], row["direction"]) for row in rows] == [
        (name, way) for name, way in both if name != "decode" or way == "forward"
    ]
    assert all(float(row["fastattn_ms"]) > 0 and float(row["sdpa_ms"]) > 0 for row in rows)


def test_flex_that_does_not_compile_is_a_note(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(contenders, "_compiled_flex", lambda: fail)
    arguments = ["--backend", "reference", "--shape", "1,2,9,8", "--against", "flex", "--seconds", "0"]
    assert main(["bench", *arguments, "--dtype", "float32", "--out", str(tmp_path)]) == 0
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        notes = {row["direction"]: row["note"] for row in csv.DictReader(file) if row["contender"] == "flex"}
    assert "no compiler found" in notes["forward"]
    assert "no backward" in notes["forward+backward"]


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


def test_peak_compiles_and_counts(cpu, monkeypatch):
    monkeypatch.setattr(peak, "_copy_bytes", lambda seconds: 1.0)  # needs half a GiB
    found = peak.measure(cpu.isa(), threads=2, seconds=0.02)
    assert found.reason == ""
    assert found.bfloat16 >= found.float32 > 0
    assert "no compiler flags" in peak.measure("abacus", 1, 0.02).reason


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
    "bad",
    [
        ["--shape", "1,2,3"],
        ["--dtype", "int8"],
        ["--against", "none"],
        ["--threads", "0"],
        ["--parts", "all"],
    ],
)
def test_bad_arguments_end_with_one_sentence(bad, capsys):
    assert main(["bench", *bad]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert bad[0] in error


def test_ratios_are_of_one_problem(tmp_path, capsys):
    """Twice the work takes longer, and every column is there."""
    arguments = ["--parts", "ratios", "--backend", "reference", "--shape", "2,2,192,32", "--seconds", "0"]
    assert main(["bench", *arguments, "--dtype", "float32", "--out", str(tmp_path)]) == 0
    with (tmp_path / "ratios.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert list(row) == list(ratios.FIELDS)
    assert all(float(row[name]) > 0 for name in ratios.RATIOS)
    assert "dv_alone" in capsys.readouterr().out


def test_ratios_ask_for_the_gradients_they_name(monkeypatch):
    results = {}

    def steps_alone(steps, seconds):
        results.update((name, step()) for name, step in steps.items())
        return dict.fromkeys(steps, 1.0)

    monkeypatch.setattr(ratios, "interleaved_medians", steps_alone)
    row = ratios.measure((1, 2, 9, 8), "float32", "reference", 0.0)
    assert {row[name] for name in ratios.RATIOS} == {1.0}
    counts = {name: len(found) for name, found in results.items() if name.startswith("backward")}
    assert counts == {
        "backward full": 3, "backward causal": 3, "backward padded": 3, "backward dropout": 3,
        "backward dq": 1, "backward dk dv": 2, "backward dv": 1,
    }  # fmt: skip
    assert not any(found.requires_grad for name, found in results.items() if name.startswith("forward"))


def test_scaling_measures_time_and_memory(tmp_path):
    assert (
        main(["bench", "--parts", "scaling", "--longest", "256", "--seconds", "0", "--out", str(tmp_path)])
        == 0
    )
    with (tmp_path / "scaling.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["axis"] for row in rows} == {"length", "batch x heads", "threads"}
    lengths = [row for row in rows if row["axis"] == "length"]
    assert [int(row["length"]) for row in lengths if row["variant"] == "full"] == [128, 256]
    assert all(float(row["milliseconds"]) > 0 for row in rows)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_phases_add_up(cpu, tmp_path):
    """Compiles the counting library: half a minute."""
    library = phases.build(cpu.isa())
    for direction, absent in (("forward", "dq"), ("forward+backward", "p v")):
        row = phases.measure(library, Cell(1, 2, 300, 64, "causal", "float32", direction), 0.1)
        shares = [row[name] for name in phases.FIELDS[7:]]
        assert sum(shares) == pytest.approx(1.0)
        assert all(0 <= share < 0.9 for share in shares)
        assert row[absent] == 0
        assert row["q k^T"] > 0.05


def test_the_installed_library_counts_no_phases(cpu):
    with pytest.raises(AttributeError):
        cpu._library.fastattn_cpu_take_phases  # noqa: B018


def test_parts_that_need_the_cpu_kernels_are_refused(capsys):
    assert main(["bench", "--parts", "phases", "--backend", "reference"]) == 2
    assert "--parts" in capsys.readouterr().err
