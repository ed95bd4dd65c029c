"""`fastattn doctor` prints what each backend says of itself."""

import fastattn
from fastattn import dispatch
from fastattn.cli import main


def printed(capsys) -> list[str]:
    assert main(["doctor"]) == 0
    return capsys.readouterr().out.splitlines()


def test_every_backend_and_why_not(capsys):
    lines = printed(capsys)
    assert f"fastattn {fastattn.__version__}" in lines
    for status in fastattn.backends():
        assert f"  {status}" in lines


def test_the_instruction_set(cpu, capsys):
    lines = printed(capsys)
    after = lines[lines.index("  cpu: available") + 1]
    assert after.startswith(f"    instruction set: {cpu.isa()}, of portable")


def test_details_also_of_a_backend_that_is_not_available(monkeypatch, capsys):
    from fastattn.backends.cuda import backend

    monkeypatch.setitem(dispatch._backends, "cuda", "no driver")
    monkeypatch.setattr(backend, "details", lambda: ["built for something"])
    lines = printed(capsys)
    assert lines[lines.index("  cuda: not available: no driver") + 1] == "    built for something"
