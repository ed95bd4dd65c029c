"""Prefix tuning with peft: same numbers, no padding, one prefix read and given its gradient for the batch."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
from zoo import BACKEND, batch, build, decoder, deviation, labels_for, run

from fastattn.hf import patch, prompt_attention

P = 3
pytestmark = pytest.mark.skipif(BACKEND == "reference", reason="the native CPU library is not built")


def tuned(kind: str, task: str, projection: bool = False):
    """A peft model with a prefix that is not close to nothing."""
    torch.manual_seed(0)
    if kind in ("gpt2", "llama"):
        model = decoder(kind, {"CAUSAL_LM": "CausalLM", "SEQ_CLS": "SequenceClassification"}[task])
    else:
        model = build(kind)
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=P, task_type=task, prefix_projection=projection, encoder_hidden_size=16
    )
    return peft.get_peft_model(model, config)


def inputs_for(task: str, padding: str) -> dict:
    inputs = batch(padding)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 0)
    if task == "SEQ_CLS":
        return {**inputs, "labels": labels_for("SequenceClassification", inputs) % 2}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    if padding == "left":
        labels[torch.arange(5), inputs["attention_mask"].argmax(1)] = -100
    return {**inputs, "labels": labels}


def seen_by_attention(monkeypatch) -> list:
    """Of every call of attention with a prompt: layer, layout, which of q, k, v, prompt have gradients."""
    seen = []
    of_layer = prompt_attention.PromptPass.of_layer

    def noted(self, module):
        def note(function):
            def call(q, k, v, *args, **options):
                kinds = tuple(t.requires_grad for t in (q, k, v, self.keys[module.layer_idx]))
                seen.append((module.layer_idx, tuple(q.shape), *kinds, tuple(self.keys[0].shape)))
                return function(q, k, v, *args, **options)

            return call

        return tuple(map(note, of_layer(self, module)))

    monkeypatch.setattr(prompt_attention.PromptPass, "of_layer", noted)
    return seen


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("bert", "SEQ_CLS"),
        ("roberta", "SEQ_CLS"),
        ("electra", "SEQ_CLS"),
        ("gpt2", "CAUSAL_LM"),
        ("llama", "CAUSAL_LM"),
        ("llama", "SEQ_CLS"),
    ],
)
def test_same_numbers_and_the_prefix_once(kind, task, padding, monkeypatch, gradients):
    inputs = inputs_for(task, padding)
    expected = run(tuned(kind, task).train(), inputs)
    model = patch(tuned(kind, task).train(), backend=BACKEND)
    seen = seen_by_attention(monkeypatch)
    gradients.clear()
    result = run(model, inputs)
    assert any("prompt_encoder" in name for name in result)
    assert max(deviation(result, expected).values()) <= 1e-5
    layer, shape, *needs, prefix = seen[0]
    assert (layer, prefix[0], prefix[2]) == (0, 1, P)
    # of the first layer's keys and values, those of the prefix alone have a gradient
    assert needs == [False, False, False, True]
    # and that is all that its backward computed: its call for the tokens' own keys never came
    assert gradients[-1] == (P, (False, True, True, False, False))
    assert [keys == P for keys, _ in gradients] == [True, False] * (len(seen) - 1) + [True]
    packed = padding == "right" or (padding == "left" and kind in ("gpt2", "llama"))
    assert shape[0] == (int(inputs["attention_mask"].sum()) if packed else 5)


def test_a_projected_prefix():
    inputs = inputs_for("SEQ_CLS", "right")
    expected = run(tuned("bert", "SEQ_CLS", True), inputs)
    result = run(patch(tuned("bert", "SEQ_CLS", True), backend=BACKEND, padding_free=True), inputs)
    assert max(deviation(result, expected).values()) <= 1e-5


def test_rows_that_differ_stay_a_cache(monkeypatch):
    """past_key_values of one's own, another for each sample."""
    from transformers import DynamicCache

    model = build("bert", "Model")
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 5, 4, P, 8, generator=generator) for _ in range(3)]
    inputs = batch("right")
    inputs["attention_mask"] = torch.cat((torch.ones(5, P).long(), inputs["attention_mask"]), dim=1)

    def states():
        cache = DynamicCache([tuple(pair) for pair in pairs])
        return model(**inputs, past_key_values=cache).last_hidden_state[
            inputs["attention_mask"][:, P:].bool()
        ]

    expected = states()
    seen = seen_by_attention(monkeypatch)
    patch(model, backend=BACKEND)
    torch.testing.assert_close(states(), expected, rtol=1e-5, atol=2e-5)
    assert not seen


@torch.no_grad()
def test_generate_behind_a_prefix():
    inputs = batch("left", size=3, length=9)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = tuned("llama", "CAUSAL_LM").eval().generate(**inputs, **options)
    model = patch(tuned("llama", "CAUSAL_LM").eval(), backend=BACKEND)
    assert torch.equal(model.generate(**inputs, **options), expected)
