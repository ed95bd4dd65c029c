"""`fastattn explain` prints what fastattn.explain says, and refuses bad input in a sentence."""

import pytest
import torch

import fastattn
from fastattn import cli


def test_prints_the_explanation_of_these_shapes(cpu, capsys):
    command = "explain 2,4,10,16 --seqlen-k 12 --kv-heads 2 --head-dim-v 8 --dtype bfloat16 --gradients q v"
    assert cli.main(command.split()) == 0
    q, v = (
        torch.empty(2, *shape, dtype=torch.bfloat16, requires_grad=True)
        for shape in ((4, 10, 16), (2, 12, 8))
    )
    k = torch.empty(2, 2, 12, 16, dtype=torch.bfloat16)
    assert capsys.readouterr().out == f"{fastattn.explain(q, k, v)}\n"


def test_without_gradients_nothing_is_saved(cpu, capsys):
    assert cli.main(["explain", "2,4,10,16", "--gradients"]) == 0
    assert "saved for backward: 0 bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("explain 2,4,10", "2,4,10"),
        ("explain 2,4,x,16", "2,4,x,16"),
        ("explain 2,4,10,300", "head_dim 300"),
        ("explain 2,4,10,16 --kv-heads 3", "3 heads"),
        ("explain 2,4,10,16 --seqlen-k -1", "-1"),
        ("explain 2,4,10,16 --dropout-p 1.5", "1.5"),
        ("explain 2,4,10,16 --backend fpga", "fpga"),
        ("explain 2,4,10,16 --device nowhere", "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(command, named, capsys):
    assert cli.main(command.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error
