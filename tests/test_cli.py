"""The command `fastattn` itself; what its subcommands do is tested beside their own code."""

import subprocess
import sys

import pytest

import fastattn
from fastattn.cli import COMMANDS, main


def test_runs_as_a_module():
    command = [sys.executable, "-m", "fastattn", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"fastattn {fastattn.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["nope"], ["--nope"]])
def test_a_command_is_needed(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "fastattn: error: " in capsys.readouterr().err


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)
