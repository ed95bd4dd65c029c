"""FeatureCache over patched models: the head alone gives the whole model's logits."""

import pytest
import torch

pytest.importorskip("transformers")
from zoo import BACKEND, batch, build

from fastattn.frozen import FeatureCache
from fastattn.hf import patch


@pytest.mark.parametrize("padding", ["right", "left"])
def test_head_on_cached_features(padding, tmp_path):
    model = patch(build("bert").eval(), backend=BACKEND)
    model.bert.requires_grad_(False)
    cache = FeatureCache(model.bert, features="pooler", directory=tmp_path)
    inputs = batch(padding)
    with torch.no_grad():
        expected = model(**inputs).logits
    calls = []
    model.bert.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        logits = model.classifier(cache(**inputs))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        logits.sum().backward()
    assert len(calls) == 1
    assert model.classifier.weight.grad is not None
