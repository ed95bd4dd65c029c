"""attn_implementation="fastattn" without patch: masks, caches and arguments as transformers gives them."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
import transformers
from transformers import masking_utils
from zoo import BACKEND, ENCODERS, batch, build, decoder

import fastattn.hf  # noqa: F401 - registers the name
from fastattn.errors import InvalidArgumentError, UnsupportedError
from fastattn.hf.interface import fastattn_attention
from fastattn.hf.masks import fastattn_mask

pytestmark = pytest.mark.skipif(BACKEND == "reference", reason="the native CPU library is not built")


def switch(model: nn.Module) -> nn.Module:
    model.set_attn_implementation("fastattn")
    return model


@pytest.mark.parametrize("family", ENCODERS)
def test_loading_by_name(family, tmp_path):
    build(family).save_pretrained(tmp_path)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    expected, ours = (
        load(tmp_path, attn_implementation="eager"),
        load(tmp_path, attn_implementation="fastattn"),
    )
    assert ours.config._attn_implementation == "fastattn"
    for padding in ("none", "right", "left", "holes"):
        inputs = batch(padding)
        torch.testing.assert_close(ours(**inputs).logits, expected(**inputs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "qwen2"])
def test_causal_models(kind, padding):
    """Left padding is where a mask that never arrives shows."""
    inputs = batch(padding)
    real = inputs["attention_mask"].bool()
    model = decoder(kind)
    labels = inputs["input_ids"].masked_fill(~real, -100)
    expected = model(**inputs, labels=labels)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    out = switch(model)(**inputs, labels=labels)
    torch.testing.assert_close(out.logits[real], expected.logits[real], rtol=1e-5, atol=2e-5)
    if padding != "left":
        # On the left the first real token is predicted from padding, whose own output is not defined.
        out.loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [4, 23, 64])
def test_sliding_window(window):
    inputs = batch("left")
    real = inputs["attention_mask"].bool()
    model = decoder("mistral", sliding_window=window)
    expected = model(**inputs).logits
    torch.testing.assert_close(switch(model)(**inputs).logits[real], expected[real], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_generate(kind, beams, cache):
    inputs = batch("left", size=3, length=9)
    model = decoder(kind)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "cache_implementation": cache}
    options |= {"eos_token_id": None, "disable_compile": True}
    expected = model.generate(**inputs, **options)
    assert torch.equal(switch(model).generate(**inputs, **options), expected)


def test_a_cache_that_grows_by_several_tokens():
    model = decoder("llama")
    ids = batch("none", size=2, length=12)["input_ids"]
    expected = model(ids).logits
    switch(model)
    first = model(ids[:, :5], use_cache=True)
    second = model(ids[:, 5:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, second], 1), expected, rtol=1e-5, atol=2e-5)


def test_packed_rows():
    """transformers' own packed keywords: sequences in one row do not see each other."""
    model = decoder("llama")
    ids = batch("none", size=1, length=20)["input_ids"]
    lengths = [3, 9, 8]
    parts = torch.split(ids, lengths, dim=1)
    expected = torch.cat([model(part).logits for part in parts], 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    switch(model)
    for dtype in (torch.int32, torch.int64):
        offsets = torch.tensor([0, 3, 12, 20], dtype=dtype)
        packed = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 9, "max_length_k": 9}
        out = model(ids, position_ids=positions, **packed).logits
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-5)
    # without a cache, position_ids alone say it too, through a mask of pairs
    out = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-5)


def test_bidirectional_llama():
    model = decoder("llama")
    inputs = batch("right")
    real = inputs["attention_mask"].bool()
    expected = model(**inputs, is_causal=False).logits
    torch.testing.assert_close(switch(model)(**inputs, is_causal=False).logits[real], expected[real])


def test_masks_stay_two_dimensional():
    mask = batch("left", size=3, length=7)["attention_mask"].bool()
    sizes = {"batch_size": 3, "q_length": 7, "kv_length": 7}
    causal = fastattn_mask(**sizes, attention_mask=mask)
    assert torch.equal(causal, mask)
    both = fastattn_mask(
        **sizes,
        attention_mask=mask,
        mask_function=masking_utils.bidirectional_mask_function,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=True,
    )
    assert torch.equal(both, mask)
    assert fastattn_mask(**sizes, attention_mask=torch.ones(3, 7, dtype=torch.bool)) is None
    assert fastattn_mask(**sizes) is None
    for window, shape in ((7, (3, 7)), (3, (3, 1, 7, 7))):
        function = masking_utils.sliding_window_causal_mask_function(window)
        got = fastattn_mask(**sizes, attention_mask=mask, mask_function=function, local_size=window)
        assert tuple(got.shape) == shape
    # the unwritten end of a static cache is cut off
    assert fastattn_mask(3, 2, 16, q_offset=5).shape == (3, 7)


def heads(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_arguments_that_are_not_known_are_refused():
    q = heads(1, 2, 3, 8)
    module = nn.Module()
    module.is_causal = False
    for name, value in (("s_aux", torch.zeros(2)), ("head_mask", torch.ones(2)), ("novelty", 3)):
        with pytest.raises(UnsupportedError, match=name):
            fastattn_attention(module, q, q, q, None, **{name: value})
    fastattn_attention(module, q, q, q, None, s_aux=None, use_cache=True, position_ids=torch.arange(3))
    with pytest.raises(UnsupportedError, match="head_mask"):
        switch(build("bert"))(**batch("right"), head_mask=torch.ones(3, 4))


def test_masks_of_the_wrong_kind_are_refused():
    q = heads(1, 2, 3, 8)
    module = nn.Module()
    for mask in (torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, 3, dtype=torch.bool)):
        with pytest.raises(InvalidArgumentError, match="attention_mask"):
            fastattn_attention(module, q, q, q, mask)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_softcap_and_position_bias(softcap):
    q, k, v = heads(2, 4, 5, 8), heads(2, 2, 7, 8), heads(2, 2, 7, 8)
    bias = heads(1, 4, 5, 7).requires_grad_()
    mask = torch.rand(2, 7) > 0.3
    mask[:, 0] = True
    module = nn.Module()
    module.is_causal = False
    options = {"scaling": 0.7, "softcap": softcap, "position_bias": bias}
    out, weights = fastattn_attention(module, q, k, v, mask, **options)
    assert weights is None
    assert out.shape == (2, 5, 4, 8)
    expected, weights = fastattn_attention(module, q, k, v, mask, output_attentions=True, **options)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(result.square().sum(), bias)[0] for result in (out, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
