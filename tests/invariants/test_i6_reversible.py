"""I6: patch then unpatch leaves a model as it was, and what a patched model saves loads without fastattn."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))

from zoo import BACKEND, ENCODERS, batch, build, labels_for, one_thread, run  # noqa: E402, F401

from fastattn.hf import patch, patched, unpatch  # noqa: E402


def anatomy(model: torch.nn.Module) -> dict:
    """Everything about a model but its numbers: classes, attributes, hooks, config."""
    parts = {"config": repr(sorted((k, repr(v)) for k, v in vars(model.config).items()))}
    for name, module in model.named_modules():
        parts[name, "class"] = type(module)
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                value = list(value)
            elif isinstance(value, dict):
                value = dict(value)
            parts[name, key] = value if isinstance(value, (dict, list, str, int, float)) else id(value)
    return parts


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_unpatch_restores_everything(family, implementation):
    inputs = batch("right")
    inputs["labels"] = labels_for("SequenceClassification", inputs)
    model = build(family)
    model.set_attn_implementation(implementation)
    expected, before = run(model, inputs), anatomy(model)
    keys = list(model.state_dict())
    patch(model, backend=BACKEND)
    assert anatomy(model) != before
    assert list(model.state_dict()) == keys
    run(model, inputs)
    unpatch(model)
    assert anatomy(model) == before
    after = run(model, inputs)
    for name, value in expected.items():
        assert torch.equal(after[name], value), name


def test_the_context_manager_unpatches_after_an_error():
    model = build("bert")
    before = anatomy(model)
    with pytest.raises(KeyError), patched(model, backend=BACKEND):
        raise KeyError
    assert anatomy(model) == before


def test_the_context_manager_leaves_a_patched_model_patched():
    model = patch(build("bert"), backend=BACKEND)
    before = anatomy(model)
    with patched(model, backend=BACKEND):
        pass
    assert anatomy(model) == before


def test_saved_patched_models_load_without_fastattn(tmp_path):
    inputs, expected = batch("right"), {}
    for family in ENCODERS:
        model = patch(build(family), backend=BACKEND)
        with torch.no_grad():
            expected[family] = model(**inputs).logits
        model.save_pretrained(tmp_path / family)
        unpatch(model).save_pretrained(tmp_path / "plain")
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / family / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    torch.save((inputs, expected), tmp_path / "expected.pt")
    script = """
import sys, torch, transformers
folder = sys.argv[1]
inputs, expected = torch.load(folder + "/expected.pt")
for family, logits in expected.items():
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder + "/" + family).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, logits, rtol=1e-4, atol=1e-5)
assert not any(name.split(".")[0] == "fastattn" for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
