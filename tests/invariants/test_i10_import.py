"""I10: `import fastattn` works with no GPU, triton, compiler or transformers, and is cheap."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

OPTIONAL = ("transformers", "triton", "peft", "matplotlib", "sklearn", "pandas", "rich", "accelerate")


def run(script: str):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_it_loads_nothing_but_torch_and_starts_no_thread():
    added, threads, loaded = run(
        "import json, os, sys, torch\n"
        "before, threads = set(sys.modules), len(os.listdir('/proc/self/task'))\n"
        "import fastattn\n"
        "added = sorted({name.split('.')[0] for name in set(sys.modules) - before})\n"
        "after = len(os.listdir('/proc/self/task'))\n"
        "native = 'libfastattn' in open('/proc/self/maps').read()\n"
        "print(json.dumps([added, after - threads, native]))"
    )
    assert not set(added) & set(OPTIONAL)
    assert threads == 0
    assert not loaded, "the native library loads when it is first needed"


def test_it_works_where_nothing_optional_is_installed():
    kinds = run(
        "import json, sys\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"  # None: importing it raises ImportError
        "import torch, fastattn\n"
        "q = torch.randn(1, 2, 5, 16)\n"
        "assert fastattn.attention(q, q, q, backend='reference').shape == q.shape\n"
        "assert fastattn.MultiHeadAttention(8, 2)\n"
        "try:\n"
        "    fastattn.patch\n"
        "except fastattn.errors.MissingDependencyError as error:\n"
        "    found = [error.extra, str(error)]\n"
        "print(json.dumps([found, [status.name for status in fastattn.backends()]]))"
    )
    (extra, message), names = kinds
    assert extra == "hf"
    assert "fastattn[hf]" in message
    assert "cpu" in names
