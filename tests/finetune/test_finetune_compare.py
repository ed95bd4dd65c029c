"""Arms in processes of their own: the comparison, Ctrl-C, and going on after it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fastattn.cli import main
from fastattn.finetune.arms import ArmError, RemoteArm
from fastattn.finetune.errors import UserInputError


def test_a_comparison_reports_every_arm(tmp_path, tiny_model, table, native):
    out = tmp_path / "out"
    options = ["--train", "lora", "--compare", "--compare-steps", "3", "--steps", "8", "--batch-size", "8"]
    assert main(["finetune", "--model", tiny_model, "--data", table, "--out", str(out), *options]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["status"] == "complete"
    assert len(report["training"]) == 8
    for key, steps in (("dropout_off", 5), ("train_mode", 3)):
        passed = report["comparison"][key]
        assert list(passed["arms"]) == ["fastattn", "sdpa", "eager"]
        for arm in passed["arms"].values():
            assert len(arm["losses"]) == steps
            assert arm["seconds"] > 0
            assert arm["peak_rss"] > 10 * 2**20
            assert arm["saved_bytes"] > 0
        assert passed["timed_steps"] == steps - 1
        assert passed["faster_arm"] in ("sdpa", "eager")
        assert passed["speedup_range"][0] <= passed["speedup"] <= passed["speedup_range"][1]
    off = report["comparison"]["dropout_off"]
    assert max(off["loss_difference"].values()) < 1e-3
    trained = report["comparison"]["train_mode"]["arms"]["fastattn"]["losses"]
    assert trained == [step["loss"] for step in report["training"][:3]]
    assert trained != off["arms"]["fastattn"]["losses"][:3]
    check = report["plain_transformers"]
    assert check["texts"] == 12
    assert check["different_labels"] == 0
    markdown = (out / "report.md").read_text()
    for part in ("dropout off", "as trained", "saved for backward", "peak RSS", "without fastattn"):
        assert part in markdown
    assert (out / "report.html").read_text().count("data:image/png;base64,") == 3


def test_ctrl_c_then_resume_equals_the_uninterrupted_run(tmp_path, tiny_model, table, native):
    def options(out):
        return ["finetune", "--model", tiny_model, "--data", table, "--train", "last-1", "--steps", "400",
                "--batch-size", "4", "--out", str(out)]  # fmt: skip

    interrupted, whole = tmp_path / "interrupted", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "fastattn", *options(interrupted)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("training"):
            process.send_signal(signal.SIGINT)
            break
    started = time.monotonic()
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "--resume" in stdout
    assert time.monotonic() - started < 100
    partial = json.loads((interrupted / "report.json").read_text())
    assert partial["status"] == "interrupted"
    made = len(partial["training"])
    assert 0 < made < 400
    assert (interrupted / "report.html").is_file()
    assert not (interrupted / "model").exists()

    assert main(["finetune", "--out", str(interrupted), "--resume"]) == 0
    assert main(options(whole)) == 0
    reports = [json.loads((out / "report.json").read_text()) for out in (interrupted, whole)]
    first, second = ([step["loss"] for step in report["training"]] for report in reports)
    assert len(first) == 400
    assert first == second
    assert reports[0]["test"] == reports[1]["test"]
    assert any("resumed" in note for note in reports[0]["notes"])
    weights = [(out / "model" / "model.safetensors").read_bytes() for out in (interrupted, whole)]
    assert weights[0] == weights[1]


def test_a_process_that_dies_is_named(tmp_path):
    arm = RemoteArm(tmp_path / "log", settings={}, label_names=[], attention="sdpa", encoded="nowhere")
    with pytest.raises(UserInputError, match="another version") as caught:
        arm.receive()
    assert "from_json" in str(caught.value.__cause__)  # where it happened, for --debug
    os.kill(arm._process.pid, signal.SIGKILL)
    with pytest.raises(ArmError, match="ended with code -9"):
        arm.call("step", index=0)
    arm.close()
