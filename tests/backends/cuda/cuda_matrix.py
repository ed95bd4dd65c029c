"""Which feature the simulator has proven on which architecture's kernels, read off the tests themselves.

The tests of this folder are run dry: `simulate` gives a device that does nothing, and `check` only notes what
it was asked. So a case counts once a test checks it, wherever it stands. Run as a script (PYTHONPATH=.) this
file writes the table of docs/proof-cuda.md; test_cuda_matrix.py holds that it is the one there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[2] / "docs" / "proof-cuda.md"
BEGIN, END = "<!-- written by cuda_matrix.py -->\n", "<!-- until here -->\n"
DTYPES = {"torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32"}
COLUMNS = ("sm_80 forward", "sm_80 backward", "sm_90a forward", "sm_90a backward")


def _triton_matrix():
    path = HERE.parent / "triton" / "proof_matrix.py"
    spec = importlib.util.spec_from_file_location("triton_proof_matrix", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class DryRun:
    """A pytest plugin: notes (capability, case) instead of checking."""

    def __init__(self):
        self.checked: list[tuple[int, object]] = []
        self.capability = 80

    def simulate(self, dims, types, variants, capability=80):
        self.capability = capability
        device = mock.MagicMock(launches=[])
        device.set_capability = lambda value: setattr(self, "capability", value)
        return device

    def check(self, case, *_, **__):
        self.checked.append((self.capability, case))

    def pytest_collection_modifyitems(self, items):
        items[:] = [
            item
            for item in items
            if "simulate" in item.fixturenames
            and not getattr(item.obj, "is_hypothesis_test", False)  # random cases are no list
            and "fault" not in item.nodeid  # what is checked there is to fail
        ]
        import oracle

        real = oracle.check
        for module in list(sys.modules.values()):
            if getattr(module, "check", None) is real:
                module.check = self.check

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef, request):
        if fixturedef.argname not in ("simulate", "library"):
            return None
        fixturedef.cached_result = (self.simulate, fixturedef.cache_key(request), None)
        return self.simulate

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem):
        names = pyfuncitem._fixtureinfo.argnames
        with contextlib.suppress(Exception):  # of what came after the check: nothing was launched
            pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names})
        return True


def serves(capability: int, case) -> str:
    """Whose kernels a problem takes, as docs/performance-cuda.md says and test_hopper.py holds."""
    features = any(name in case.options for name in ("softcap", "dropout_p", "scale"))
    plain = not (features or case.bias or case.relative_bias or case.alibi)
    dim = max(case.head_dim, case.head_dim_v)
    own = dim > 32 and "float32" not in str(case.dtype)
    return "sm_90a" if capability == 90 and plain and own else "sm_80"


def table(checked: list[tuple[int, object]]) -> str:
    triton = _triton_matrix()
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|{'---|' * (1 + len(COLUMNS))}"]
    for name, has in triton.FEATURES.items():
        cells = []
        for column in COLUMNS:
            kernels, direction = column.split()
            if name in (triton.ONLY_BACKWARD if direction == "forward" else triton.ONLY_FORWARD):
                cells.append("")
                continue
            found = {
                DTYPES[str(case.dtype)]
                for capability, case in checked
                if has(case)
                and (case.wanted or direction == "forward")
                and serves(capability, case) == kernels
            }
            cells.append(" ".join(dtype for dtype in DTYPES.values() if dtype in found) or "–")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def dry_run() -> str:
    """The table of all tests in this folder, from a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--print"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def documented() -> str:
    return DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]


if __name__ == "__main__":
    if "--print" in sys.argv:
        plugin = DryRun()
        pytest.main(["-q", "-p", "no:cacheprovider", "--capture=no", str(HERE)], plugins=[plugin])
        print("\n" + json.dumps(table(plugin.checked)))
    else:
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(text.replace(documented(), dry_run()), encoding="utf-8")
