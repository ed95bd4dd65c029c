"""GPT Neo and GPT-J, whose attention is their own. What holds for every family: test_hf_families.py."""

import copy
import io

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from transformers.models.gpt_neo import modeling_gpt_neo
from transformers.models.gptj import modeling_gptj
from zoo import BACKEND, VOCAB, batch, deviation, run, specimen, training_inputs, twin

from fastattn.errors import UnsupportedError, UnsupportedModelError
from fastattn.hf import patch, unpatch

FAMILIES = ("gpt_neo", "gptj")
PLAIN = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": VOCAB, "disable_compile": True}


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def attention_of(model) -> torch.nn.Module:
    attention = model.transformer.h[1].attn
    return getattr(attention, "attention", attention)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_window_narrower_than_the_cache(cache):
    """In a static cache transformers counts the window from its end, written or not; we, from the query."""
    model = specimen("gpt_neo", window_size=5)
    inputs = batch("left", size=3, length=9)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 0)
    expected = model.generate(**inputs, **PLAIN)
    patch(model, backend=BACKEND)
    assert torch.equal(model.generate(**inputs, **PLAIN, cache_implementation=cache), expected)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_pairs(name, dtype):
    """One that the caller made: causal, and no token sees the third; GPT Neo's window comes on top."""
    model, inputs = specimen(name, **({"window_size": 5} if name == "gpt_neo" else {})), batch("none")
    mask = torch.ones(23, 23).tril()
    mask[3:, 2] = 0
    additive = torch.zeros(5, 1, 23, 23).masked_fill(mask == 0, torch.finfo(torch.float32).min)
    expected = model(inputs["input_ids"], attention_mask=additive).logits
    mask = additive if dtype is torch.float32 else mask.bool()[None, None]
    assert close(patch(model, backend=BACKEND)(inputs["input_ids"], attention_mask=mask).logits, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_weights(name):
    model, inputs = specimen(name), batch("left")
    real = inputs["attention_mask"].bool()
    expected = model(**inputs, output_attentions=True)
    out = patch(model, backend=BACKEND)(**inputs, output_attentions=True)
    assert close(out.logits[real], expected.logits[real])
    rows = real[:, None, :, None].expand_as(out.attentions[1])
    assert len(out.attentions) == 2
    assert close(out.attentions[1][rows], expected.attentions[1][rows])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing(name, reentrant):
    """A layer that is run again in backward finds the packed sequences as it found them before."""
    model, inputs = specimen(name).train(), training_inputs(name, padding="right")
    expected = run(model, inputs)
    patch(model, backend=BACKEND, padding_free=True)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert max(deviation(run(model, inputs), expected).values()) <= 1e-5


@pytest.mark.parametrize("copier", ["deepcopy", "torch.save"])
@pytest.mark.parametrize("name", FAMILIES)
def test_copies_of_a_patched_model(name, copier):
    model, inputs = specimen(name), training_inputs(name, padding="right")
    expected = run(model, inputs)
    patch(model, backend=BACKEND)
    if copier == "deepcopy":
        duplicate = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        duplicate = torch.load(file, weights_only=False)
    assert max(deviation(run(duplicate, inputs), expected).values()) <= 1e-5
    assert max(deviation(run(unpatch(duplicate), inputs), expected).values()) == 0
    assert type(attention_of(model)).__module__ == "fastattn.hf.own_attention"


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_dropout(name):
    """Drawn from torch's generator, in training alone."""
    changes = {"attention_dropout": 0.5} if name == "gpt_neo" else {"attn_pdrop": 0.5}
    model, inputs = patch(specimen(name, **changes), backend=BACKEND), training_inputs(name)
    plain = specimen(name)(**inputs).loss
    assert close(model(**inputs).loss, plain)
    model.train()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(**inputs).loss)
    assert torch.equal(losses[0], losses[1])
    assert not close(losses[0], losses[2])
    assert not close(losses[0], plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_head_reads_reaches_the_layers(name):
    """No keyword does: a label at a masked position must still keep the padding."""
    # A window that reaches back to the tokens from everywhere: else padding sees nothing at all.
    changes = {"window_size": 64} if name == "gpt_neo" else {}
    model, inputs = specimen(name, **changes).train(), training_inputs(name, padding="right")
    inputs["labels"] = inputs["input_ids"].clone()
    expected = run(model, inputs)
    assert max(deviation(run(patch(twin(model), backend=BACKEND), inputs), expected).values()) <= 1e-5
    with pytest.raises(UnsupportedError, match="label"):
        patch(model, backend=BACKEND, padding_free=True)(**inputs)


@pytest.mark.parametrize("name", FAMILIES)
def test_loaded_by_name_then_patched(name, tmp_path):
    specimen(name).save_pretrained(tmp_path)
    inputs = batch("right")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="fastattn")
    expected = model(**inputs).logits
    kind = type(attention_of(model))
    unpatch(patch(model, backend=BACKEND))
    assert type(attention_of(model)) is kind
    assert torch.equal(model(**inputs).logits, expected)


def _twice_the_scale(self, query, key, value, attention_mask=None):
    scores = 2 * query @ key.mT if attention_mask is None else 2 * query @ key.mT + attention_mask
    weights = scores.softmax(-1)
    return weights @ value, weights


def _with_a_sink(self, query, key, value, attention_mask=None):
    return self.sinks, None


@pytest.mark.parametrize(
    ("replacement", "message"),
    [(_twice_the_scale, "computes something else"), (_with_a_sink, "sinks"), (None, "with a method _attn")],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_transformers_that_computes_something_else_is_refused(name, replacement, message, monkeypatch):
    classes = {"gpt_neo": modeling_gpt_neo.GPTNeoSelfAttention, "gptj": modeling_gptj.GPTJAttention}
    model = specimen(name)
    if replacement is None:
        monkeypatch.delattr(classes[name], "_attn")
    else:
        monkeypatch.setattr(classes[name], "_attn", replacement)
    with pytest.raises(
        UnsupportedModelError, match=f"{name}.*{message}.*transformers {transformers.__version__}"
    ):
        patch(model)
    assert model.config._attn_implementation == "eager"
    assert type(attention_of(model)) is classes[name]
