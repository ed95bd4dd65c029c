"""MultiHeadAttention against the module it stands in for."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fastattn import MultiHeadAttention
from fastattn.errors import InvalidArgumentError

pytestmark = pytest.mark.usefixtures("cpu")

CONFIGURATIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "own dims of key and value": {"kdim": 12, "vdim": 20},
    "learned and zero keys": {"add_bias_kv": True, "add_zero_attn": True},
}


def pair(**configuration):
    torch_module = nn.MultiheadAttention(24, 3, **configuration)
    for parameter in torch_module.parameters():  # torch starts biases at zero, which would hide them
        nn.init.normal_(parameter, std=0.3)
    return torch_module, MultiHeadAttention.from_torch(torch_module)


def compare(torch_module, ours, arguments, **more):
    """Outputs and all parameters' gradients agree, fp32 rounding apart."""
    results = []
    for module in (torch_module, ours):
        module.zero_grad()
        inputs = [x.detach().requires_grad_() for x in arguments]
        output, weights = module(*inputs, need_weights=False, **more)
        assert weights is None
        output.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
        results.append((output.detach(), [x.grad for x in inputs], gradients))
    torch.testing.assert_close(results[1], results[0], atol=2e-4, rtol=2e-4)


def inputs_for(configuration, batch=3, length=7, source=9):
    shapes = [(length, batch, 24), (source, batch, configuration.get("kdim", 24))]
    shapes.append((source, batch, configuration.get("vdim", 24)))
    tensors = [torch.randn(shape) for shape in shapes]
    return [x.transpose(0, 1) for x in tensors] if configuration.get("batch_first") else tensors


@pytest.mark.parametrize("configuration", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
@pytest.mark.parametrize("mask", ["none", "padding", "float padding", "bool", "float", "per head", "both"])
def test_same_as_torch(configuration, mask):
    torch_module, ours = pair(**configuration)
    padding = torch.rand(3, 9) < 0.4
    padding[:, 0] = False
    hidden = torch.rand(7, 9) < 0.3
    hidden[:, 0] = False
    more = {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.randn(3, 9)},
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": torch.randn(7, 9)},
        "per head": {"attn_mask": torch.randn(9, 7, 9)},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
    }[mask]
    compare(torch_module, ours, inputs_for(configuration), **more)


def test_causal_self_attention():
    torch_module, ours = pair(batch_first=True)
    x = torch.randn(2, 8, 24)
    causal = nn.Transformer.generate_square_subsequent_mask(8)
    for module in (torch_module, ours):
        module.eval()
    expected, _ = torch_module(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)
    for mask in (causal, None):
        actual, _ = ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_unbatched():
    torch_module, ours = pair()
    x = torch.randn(5, 24)
    mask = torch.tensor([False, False, True, False, True])
    expected, _ = torch_module(x, x, x, key_padding_mask=mask, need_weights=False)
    actual, _ = ours(x, x, x, key_padding_mask=mask, need_weights=False)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_weights_are_torchs_own_and_announced():
    torch_module, ours = pair()
    arguments = inputs_for({})
    with pytest.warns(UserWarning, match="need_weights=False"):
        actual = ours(*arguments)
    torch.testing.assert_close(actual, torch_module(*arguments))


def test_state_dict_passes_both_ways():
    torch_module, ours = nn.MultiheadAttention(16, 2), MultiHeadAttention(16, 2)
    assert ours.load_state_dict(torch_module.state_dict())
    assert torch_module.load_state_dict(ours.state_dict())
    assert ours.state_dict().keys() == torch_module.state_dict().keys()


def test_conversions_share_parameters():
    torch_module, ours = pair(dropout=0.1)
    back = ours.eval().to_torch()
    assert type(back) is nn.MultiheadAttention
    assert not back.training
    assert back.dropout == 0.1
    for name, parameter in torch_module.named_parameters():
        assert dict(ours.named_parameters())[name] is parameter
        assert dict(back.named_parameters())[name] is parameter


def test_dropout_only_in_training_and_reproducible():
    _, ours = pair(dropout=0.5)
    x = torch.randn(6, 2, 24)

    def output(seed):
        torch.manual_seed(seed)
        return ours(x, x, x, need_weights=False)[0]

    assert torch.equal(output(1), output(1))
    assert not torch.equal(output(1), output(2))
    ours.eval()
    assert torch.equal(output(1), output(2))


def test_copies_compute_the_same():
    _, ours = pair()
    x = torch.randn(6, 2, 24)
    expected, _ = ours(x, x, x, need_weights=False)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(copied(x, x, x, need_weights=False)[0], expected)


def test_inside_torchs_encoder_layer():
    layer = nn.TransformerEncoderLayer(24, 3, 32, dropout=0.0, batch_first=True)
    x, padding = torch.randn(2, 6, 24), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    expected = layer(x, src_key_padding_mask=padding)
    layer.self_attn = MultiHeadAttention.from_torch(layer.self_attn)
    actual = layer(x, src_key_padding_mask=padding)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("attn_mask", {"attn_mask": torch.zeros(7, 8)}),
        ("attn_mask", {"attn_mask": torch.zeros(7, 9, dtype=torch.int64)}),
        ("key_padding_mask", {"key_padding_mask": torch.zeros(3, 8, dtype=torch.bool)}),
        ("is_causal", {"is_causal": True}),
    ],
)
def test_bad_masks_are_named(name, more):
    _, ours = pair()
    with pytest.raises(InvalidArgumentError) as caught:
        ours(*inputs_for({}), need_weights=False, **more)
    assert caught.value.argument == name
