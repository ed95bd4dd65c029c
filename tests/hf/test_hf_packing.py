"""The padding-free encoder: exact where it is used, and not used where it would not be."""

import logging

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from zoo import BACKEND, ENCODERS, PADDINGS, batch, build, deviation, labels_for, run, twin

from fastattn import log
from fastattn.errors import InvalidArgumentError, UnsupportedError, UnsupportedModelError
from fastattn.hf import call, patch
from fastattn.hf.families import Reads
from fastattn.hf.packing import Layout, plan


class Watch:
    """Shapes of the hidden states that the first and the last layer are given and return."""

    def __init__(self, model: nn.Module, family: str = "bert"):
        base = getattr(model, family, model)
        self.layers = (base.transformer if family == "distilbert" else base.encoder).layer
        self.seen = []
        self.handles = [
            layer.register_forward_hook(lambda _, args, out: self.seen.append((args[0].shape, out.shape)))
            for layer in (self.layers[0], self.layers[-1])
        ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What is logged once, as if nothing had been logged before."""
    monkeypatch.setattr(log, "_said", set())
    caplog.set_level(logging.INFO, logger="fastattn")
    return caplog


@pytest.mark.parametrize("padding", PADDINGS)
def test_pack_and_pad_are_inverse_and_differentiable(padding):
    mask = batch(padding, size=4, length=6)["attention_mask"].bool()
    layout = plan(mask, Reads.TOKENS)
    if padding == "none":
        assert layout is None
        return
    assert isinstance(layout, Layout)
    lengths = mask.sum(1)
    assert layout.cu_seqlens.tolist() == [0, *lengths.cumsum(0).tolist()]
    assert layout.cu_seqlens.dtype == torch.int32
    assert (layout.max_seqlen, layout.min_seqlen) == (int(lengths.max()), int(lengths.min()))
    hidden = torch.randn(4, 6, 2, dtype=torch.float64, requires_grad=True)
    packed = layout.pack(hidden)
    assert torch.equal(packed[0], hidden[mask])
    assert torch.equal(layout.pad(packed), hidden * mask[..., None])
    assert torch.autograd.gradcheck(layout.pack, hidden)
    assert torch.autograd.gradcheck(layout.pad, packed.detach().requires_grad_())


@pytest.mark.parametrize("family", ENCODERS)
def test_layers_see_real_tokens_only(family):
    inputs = batch("right")
    model = patch(build(family, "TokenClassification"), backend=BACKEND)
    with Watch(model, family) as watch, torch.no_grad():
        model(**inputs)
    tokens = int(inputs["attention_mask"].sum())
    assert watch.seen == [((1, tokens, 32), (1, tokens, 32))] * 2


@pytest.mark.parametrize("family", ENCODERS)
def test_a_first_token_head_needs_one_row_of_the_last_layer(family):
    inputs = batch("right")
    model = patch(build(family), backend=BACKEND)
    with Watch(model, family) as watch, torch.no_grad():
        model(**inputs)
    assert watch.seen[1][1] == (1, 5, 32)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", ENCODERS)
def test_hidden_states_are_padded_again(family, padding):
    inputs = batch(padding)
    real = inputs["attention_mask"].bool()
    model = build(family)
    changed = patch(twin(model), backend=BACKEND)
    for _ in range(2):
        expected = model(**inputs, output_hidden_states=True)
        out = changed(**inputs, output_hidden_states=True)
        torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-5)
        assert len(out.hidden_states) == len(expected.hidden_states) == 4
        for ours, theirs in zip(out.hidden_states, expected.hidden_states, strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=2e-5)
    # left padding: the head reads the first position, so its padding stays
    assert padding == "left" or not out.hidden_states[2][~real].any()


@pytest.mark.parametrize("as_dict", [True, False])
@pytest.mark.parametrize("family", ENCODERS)
def test_bare_model(family, as_dict):
    inputs = batch("right")
    real = inputs["attention_mask"].bool()
    model = build(family, "Model")
    expected = model(**inputs, output_hidden_states=True)
    changed = patch(twin(model), backend=BACKEND, padding_free=True)
    out = changed(**inputs, output_hidden_states=True, return_dict=as_dict)
    last, states = (out.last_hidden_state, out.hidden_states) if as_dict else (out[0], out[-1])
    torch.testing.assert_close(last[real], expected.last_hidden_state[real], rtol=1e-5, atol=2e-5)
    assert not last[~real].any()
    for ours, theirs in zip(states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_a_sample_without_a_token_disturbs_nobody(head):
    inputs = batch("right")
    model = build("bert", head)
    expected = model(**inputs).logits
    inputs["attention_mask"][2] = 0
    keep = [0, 1, 3, 4]
    for padding_free in ("auto", False):
        changed = patch(twin(model), backend=BACKEND, padding_free=padding_free)
        logits = changed(**inputs).logits
        assert logits.isfinite().all()
        real = inputs["attention_mask"].bool()[keep] if head == "TokenClassification" else slice(None)
        torch.testing.assert_close(logits[keep][real], expected[keep][real], rtol=1e-5, atol=1e-5)
    inputs["attention_mask"][:] = 0
    assert changed(**inputs).logits.isfinite().all()
    assert patch(twin(model), backend=BACKEND)(**inputs).logits.isfinite().all()


def test_left_padding_keeps_what_the_head_reads(warnings):
    inputs = batch("left")
    model = patch(build("bert"), backend=BACKEND)
    for _ in range(2):
        model(**inputs)
    said = [record.message for record in warnings.records if "padding stays" in record.message]
    assert len(said) == 1
    assert "first position is masked" in said[0]
    with pytest.raises(UnsupportedError, match="first position is masked"):
        patch(build("bert"), backend=BACKEND, padding_free=True)(**inputs)
    # a head that reads tokens only is not concerned
    patch(build("bert", "TokenClassification"), backend=BACKEND, padding_free=True)(**inputs)


@pytest.mark.parametrize("family", ENCODERS)
def test_labels_at_padded_positions_count_in_the_loss(family, warnings):
    """People do train that way; transformers counts those positions, so they must be computed."""
    inputs = batch("right")
    inputs["labels"] = torch.randint(0, 3, inputs["input_ids"].shape)
    model = build(family, "TokenClassification")
    expected = run(model, inputs)
    changed = patch(twin(model), backend=BACKEND)
    assert max(deviation(run(changed, inputs), expected).values()) <= 1e-5
    assert "label other than -100" in warnings.text
    positional = changed(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"])
    torch.testing.assert_close(positional.loss.detach(), expected["loss"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ENCODERS)
def test_question_answering_reads_padding(family, warnings):
    inputs = {**batch("right"), "start_positions": torch.arange(5), "end_positions": torch.arange(5) + 2}
    model = build(family, "QuestionAnswering", num_labels=2)
    expected = model(**inputs)
    out = patch(twin(model), backend=BACKEND)(**inputs)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.start_logits, expected.start_logits, rtol=1e-5, atol=2e-5)
    assert "head reads the output at padded positions" in warnings.text


def test_multiple_choice_flattens_its_batch():
    inputs = batch("right", size=6)
    inputs = {name: value.view(3, 2, -1) for name, value in inputs.items()}
    for family in ENCODERS:
        model = build(family, "MultipleChoice")
        expected = model(**inputs).logits
        torch.testing.assert_close(
            patch(model, backend=BACKEND)(**inputs).logits, expected, rtol=1e-5, atol=1e-5
        )


def test_discriminator_loss_follows_the_mask():
    inputs = batch("right")
    inputs["labels"] = torch.randint(0, 2, inputs["input_ids"].shape)
    model = build("electra", "PreTraining")
    expected = model(**inputs).loss
    changed = patch(model, backend=BACKEND, padding_free=True)
    torch.testing.assert_close(changed(**inputs).loss, expected, rtol=1e-5, atol=1e-6)


def test_embeddings_in_place_of_ids():
    inputs = batch("right")
    model = build("bert")
    embeddings = model.bert.embeddings.word_embeddings(inputs.pop("input_ids")).detach()
    expected = model(inputs_embeds=embeddings, **inputs).logits
    patch(model, backend=BACKEND, padding_free=True)
    leaf = embeddings.clone().requires_grad_()
    logits = model(inputs_embeds=leaf, **inputs).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    logits.sum().backward()
    assert not leaf.grad[inputs["attention_mask"] == 0].any()
    assert leaf.grad.abs().sum() > 0


def test_garbage_in_padding_does_not_leak():
    inputs = batch("right")
    model = build("bert")
    embeddings = model.bert.embeddings.word_embeddings(inputs.pop("input_ids")).detach()
    patch(model, backend=BACKEND, padding_free=True)
    expected = model(inputs_embeds=embeddings, **inputs).logits
    embeddings[inputs["attention_mask"] == 0] = float("nan")
    assert torch.equal(model(inputs_embeds=embeddings, **inputs).logits, expected)


def test_a_mask_of_pairs_keeps_its_padding():
    inputs = batch("none")
    pairs = torch.rand(5, 1, 23, 23) > 0.3
    pairs |= torch.eye(23, dtype=torch.bool)
    additive = torch.zeros(5, 1, 23, 23).masked_fill(~pairs, torch.finfo(torch.float32).min)
    model = build("bert")
    expected = model(input_ids=inputs["input_ids"], attention_mask=additive).logits
    patch(model, backend=BACKEND)
    for mask in (pairs, additive):
        logits = model(input_ids=inputs["input_ids"], attention_mask=mask).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_users_hook_on_the_encoder_sees_every_token():
    inputs = batch("right")
    model = build("bert")
    expected = model.bert(**inputs).last_hidden_state
    patch(model, backend=BACKEND)
    seen = []
    handle = model.bert.encoder.register_forward_hook(lambda *call: seen.append(call[2]))
    model(**inputs)
    handle.remove()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(seen[0].last_hidden_state[real], expected[real], rtol=1e-5, atol=2e-5)


def test_an_attention_that_ignores_the_packing_is_an_error(monkeypatch):
    """As a transformers version would be that no longer hands keywords down to its attention."""
    model = patch(build("bert", "TokenClassification"), backend=BACKEND)
    layer = model.bert.encoder.layer[1].attention.self
    forward = layer.forward
    monkeypatch.setattr(
        layer, "forward", lambda hidden, attention_mask=None, **kwargs: forward(hidden, attention_mask)
    )
    with pytest.raises(UnsupportedModelError, match="2 of 3 layers"):
        model(**batch("right"))


def test_a_head_that_drops_keywords_is_an_error(monkeypatch):
    model = patch(build("bert"), backend=BACKEND)
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda input_ids, attention_mask, **kwargs: forward(input_ids, attention_mask)
    )
    with pytest.raises(UnsupportedModelError, match="did not pass its keyword arguments on"):
        model(**batch("right"))


def test_another_attention_chosen_after_patch_wins(warnings):
    inputs = batch("right")
    model = build("bert")
    expected = model(**inputs).logits
    patch(model, backend=BACKEND)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert "attn_implementation was set to 'sdpa'" in warnings.text


@pytest.mark.skipif(BACKEND == "reference", reason="autograd of the reference saves what it likes")
def test_less_is_saved_for_backward():
    """Bytes of distinct storages held for backward, without parameters: at least padding's share goes."""
    inputs = batch("right", size=6, length=40)
    inputs["labels"] = torch.arange(6) % 3
    share = inputs["attention_mask"].float().mean().item()
    model = build("bert")
    model.set_attn_implementation("sdpa")

    def saved_bytes(changed: nn.Module) -> int:
        known = {parameter.untyped_storage().data_ptr() for parameter in changed.parameters()}
        found = {}

        def note(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = changed(**inputs).loss
        total = sum(found.values())
        loss.backward()
        return total

    before = saved_bytes(model)
    after = saved_bytes(patch(model, backend=BACKEND))
    assert after <= share * before, (after, before, share)


def test_options_are_checked():
    with pytest.raises(InvalidArgumentError, match="padding_free"):
        patch(build("bert"), padding_free="always")
    offsets = torch.tensor([0, 23], dtype=torch.int32)
    model = build("bert")
    model.set_attn_implementation("fastattn")
    with pytest.raises(InvalidArgumentError, match="cu_seq_lens_q"):
        model(input_ids=batch("none")["input_ids"], cu_seq_lens_q=offsets)


def test_every_call_is_a_new_one():
    """Nothing of one batch is left for the next, whatever their shapes and masks."""
    model = build("bert", "TokenClassification")
    changed = patch(twin(model), backend=BACKEND)
    for seed, padding in enumerate(("right", "none", "left", "right", "holes")):
        inputs = batch(padding, size=3 + seed % 2, length=9 + 3 * seed, seed=seed)
        inputs["labels"] = labels_for("TokenClassification", inputs)
        assert max(deviation(run(changed, inputs), run(model, inputs)).values()) <= 1e-5
    assert call.KEYWORD not in vars(changed)
