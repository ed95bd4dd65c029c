"""T5's position bias by distance: exact, differentiable, O(N); and what a frozen encoder spares."""

import logging

import pytest
import torch

pytest.importorskip("transformers")
from seq2seq_zoo import run_seq2seq, seq2seq, sources, targets
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import BACKEND, deviation, twin

from fastattn import log
from fastattn.errors import UnsupportedModelError
from fastattn.hf import patch
from fastattn.hf.families import relative

pytestmark = pytest.mark.skipif(BACKEND == "reference", reason="the native CPU library is not built")
T5 = ("t5", "mt5")


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def largest(model, inputs) -> int:
    with Largest() as mode:
        model(**inputs).loss.backward()
    return mode.numel


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", T5)
def test_nothing_of_the_size_of_the_scores_is_made(family, padded):
    """Forward and backward of a training step, encoder, decoder and cross-attention."""
    length, heads = 160, 4
    ids = torch.randint(5, 99, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 100:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    model = seq2seq(family).train()
    assert largest(model, inputs) >= 2 * heads * length * length
    changed = patch(twin(model), backend=BACKEND)
    for options in ({}, {"use_cache": False, "decoder_attention_mask": mask}):
        # The largest are the MLP's (2, N, 48) and the logits (2, N, 99).
        assert largest(changed, {**inputs, **options}) <= 2 * length * 99 < heads * length * length
    model.eval()
    changed.eval()
    with torch.no_grad(), Largest() as mode:
        changed.generate(ids, attention_mask=mask, max_new_tokens=3)
    assert mode.numel <= 2 * length * 99


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("sizes", [(1, 1, 0), (1, 40, 39), (7, 40, 33), (40, 40, 0), (3, 64, 11)])
def test_the_bias_of_every_pair(stack, sizes):
    """What transformers computes, and the gradient of its table."""
    attention = getattr(seq2seq("t5"), stack).block[0].layer[0].SelfAttention
    num_queries, num_keys, before = sizes
    weight = attention.relative_attention_bias.weight
    theirs = attention.compute_bias(num_queries, num_keys, past_seen_tokens=before)
    upstream = torch.randn_like(theirs)
    (expected,) = torch.autograd.grad(theirs, weight, upstream)
    bias = relative.by_distance(attention, *sizes, weight.device)
    assert bias.shape == (4, num_queries + num_keys - 1)
    ours = relative.of_pairs(bias, num_queries, num_keys)
    assert torch.equal(ours, theirs)
    (gradient,) = torch.autograd.grad(ours, weight, upstream)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", ["table", "all but the table"])
@pytest.mark.parametrize("family", T5)
def test_the_table_alone_or_not_at_all(family, frozen):
    inputs = {**sources(family), "labels": targets()}
    model = seq2seq(family).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(("relative_attention_bias" in name) == (frozen != "table"))
    expected = run_seq2seq(model, inputs)
    assert sum("relative_attention_bias" in name for name in expected) == 2 * (frozen != "table")
    assert max(deviation(run_seq2seq(patch(model, backend=BACKEND), inputs), expected).values()) <= 1e-5


def test_without_patch_the_large_bias_is_made_and_said(caplog, monkeypatch):
    monkeypatch.setattr(log, "_said", set())
    caplog.set_level(logging.WARNING, logger="fastattn")
    inputs = {**sources("t5"), "labels": targets()}
    model = seq2seq("t5").train()
    expected = run_seq2seq(model, inputs)
    for part in (model.encoder, model.decoder):  # old versions do not hand it down
        part.set_attn_implementation("fastattn")
    assert max(deviation(run_seq2seq(model, inputs), expected).values()) <= 1e-5
    assert "T5Attention made a position bias for every pair of tokens" in caplog.text
    caplog.clear()
    monkeypatch.setattr(log, "_said", set())
    run_seq2seq(patch(model, backend=BACKEND), inputs)
    assert "position bias" not in caplog.text


def _another_formula(self, *args, **kwargs):
    return 2 * type(self).compute_bias(self, *args, **kwargs)


def _older_arguments(self, query_length, key_length, device=None, cache_position=None):
    raise AssertionError("not reached")


@pytest.mark.parametrize(
    ("formula", "reason"),
    [(_another_formula, "compute_bias is not"), (_older_arguments, "past_seen_tokens")],
)
def test_a_changed_formula_is_an_error(formula, reason, monkeypatch):
    model = seq2seq("t5")
    attention = model.decoder.block[0].layer[0].SelfAttention
    monkeypatch.setattr(attention, "compute_bias", formula.__get__(attention))
    with pytest.raises(UnsupportedModelError, match=f"T5Attention is not built.*{reason}.*transformers"):
        patch(model, backend=BACKEND)
    assert not model._forward_pre_hooks


def test_a_changed_structure_is_an_error():
    for break_it, reason in (
        (
            lambda model: delattr(model.encoder.block[0].layer[0].SelfAttention, "relative_attention_bias"),
            "bias",
        ),
        (lambda model: delattr(model.decoder.block[1].layer[1], "EncDecAttention"), "EncDecAttention"),
        (lambda model: setattr(model.encoder, "block", None), "block"),
    ):
        model = seq2seq("t5")
        break_it(model)
        with pytest.raises(UnsupportedModelError, match=reason):
            patch(model, backend=BACKEND)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_frozen_encoder_costs_no_backward(family, gradients):
    """Keys and values of cross-attention that nothing trains get no gradient; the encoder saves nothing."""
    inputs = {**sources(family), "labels": targets()}
    model = seq2seq(family).train()
    for name, parameter in model.get_decoder().named_parameters():
        cross = "EncDecAttention" in name or "encoder_attn." in name
        of_keys = name.split(".")[-2] in ("k", "v", "k_proj", "v_proj")
        parameter.requires_grad_(not (cross and of_keys))
    model.get_encoder().requires_grad_(False)  # its embeddings are the decoder's
    expected = run_seq2seq(model, inputs)
    patch(model, backend=BACKEND)
    encoder, saved, opened = model.get_encoder(), [], []

    def note(tensor):
        saved.append(tensor)
        return tensor

    def before(*_):
        opened.append(torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor))
        opened[-1].__enter__()

    encoder.register_forward_pre_hook(before)
    encoder.register_forward_hook(lambda *_: opened[-1].__exit__(None, None, None))
    assert max(deviation(run_seq2seq(model, inputs), expected).values()) <= 1e-5
    assert opened
    assert saved == []
    tokens = int(inputs["attention_mask"].sum())
    assert [needs[:3] for keys, needs in gradients if keys == tokens] == [(True, False, False)] * 2
    # the decoder's own attention: all three, and the table's where there is one
    own = [needs for keys, needs in gradients if keys != tokens]
    assert own[0][:3] == (True, True, True)
    assert own[0][4] == (family == "t5")
    gradients.clear()
    model.get_encoder().requires_grad_(True)
    run_seq2seq(model, inputs)
    assert (tokens, (True, True, True)) in [(keys, needs[:3]) for keys, needs in gradients]
