"""The oracle itself: against finite differences, PyTorch's attention, and what the words say."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import fastattn
from fastattn import philox


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def reference(*args, **more):
    function = fastattn.varlen_attention if "cu_seqlens_q" in more else fastattn.attention
    return function(*args, **more, backend="reference")


def test_gradients_of_every_feature_against_finite_differences():
    tensors = (double(2, 4, 5, 6), double(2, 2, 7, 6), double(2, 2, 7, 3), double(1, 4, 5, 7), double(4, 11))
    key_mask = torch.rand(2, 7) > 0.3

    options = {"causal": True, "window": (4, None), "softcap": 2.0, "dropout_p": 0.2, "seed": 5}
    slopes = torch.full((2, 4), 0.1, dtype=torch.float64)

    def function(q, k, v, bias, relative_bias):
        biases = {"bias": bias, "relative_bias": relative_bias, "alibi_slopes": slopes}
        out, lse = reference(q, k, v, key_mask=key_mask, **biases, **options, return_lse=True)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(function, tensors)


def test_packed_gradients_against_finite_differences():
    offsets_q = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    offsets_k = torch.tensor([1, 4, 6, 6], dtype=torch.int32)

    def function(q, k, v):
        return reference(q, k, v, cu_seqlens_q=offsets_q, cu_seqlens_k=offsets_k, causal=True)

    assert torch.autograd.gradcheck(function, (double(6, 2, 4), double(7, 1, 4), double(7, 1, 3)))


@pytest.mark.parametrize("causal", [False, True])
def test_as_pytorch_computes_it(causal):
    q, k, v = double(2, 4, 6, 8), double(2, 2, 6, 8), double(2, 2, 6, 8)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(reference(q, k, v, causal=causal), expected)


def test_masks_and_biases_by_the_words():
    """Every feature against a loop over queries and keys that reads like the documentation."""
    heads, seqlen_q, seqlen_k, left, right = 2, 4, 6, 2, 1
    q, k = double(1, heads, seqlen_q, 5), double(1, heads, seqlen_k, 5)
    v = torch.eye(seqlen_k, dtype=torch.float64).expand(1, heads, -1, -1)
    relative_bias, slopes = double(heads, seqlen_q + seqlen_k - 1), torch.tensor([0.5, 0.1]).double()
    options = {"scale": 0.7, "softcap": 3.0, "window": (left, right), "return_lse": True}
    with torch.no_grad():
        weights, lse = reference(q, k, v, relative_bias=relative_bias, alibi_slopes=slopes, **options)
        products = q @ k.transpose(2, 3)
    for h in range(heads):
        for i in range(seqlen_q):
            diagonal = i + seqlen_k - seqlen_q
            scores = {}
            for j in range(seqlen_k):
                if diagonal - left <= j <= diagonal + right:
                    score = 3.0 * math.tanh(0.7 * float(products[0, h, i, j]) / 3.0)
                    score += float(relative_bias[h, j - i + seqlen_q - 1])
                    scores[j] = score - float(slopes[h]) * abs(diagonal - j)
            total = sum(map(math.exp, scores.values()))
            assert float(lse[0, h, i]) == pytest.approx(math.log(total))
            for j in range(seqlen_k):
                expected = math.exp(scores[j]) / total if j in scores else 0.0
                assert float(weights[0, h, i, j]) == pytest.approx(expected)


def test_packed_sequences_are_padded_ones():
    q, k, v = double(9, 4, 8), double(11, 2, 8), double(11, 2, 8)
    starts_q, starts_k = [0, 4, 9], [0, 8, 11]
    bias = double(2, 1, 5, 8)
    relative_bias = double(4, 12)
    offsets = {
        "cu_seqlens_q": torch.tensor(starts_q, dtype=torch.int32),
        "cu_seqlens_k": torch.tensor(starts_k, dtype=torch.int32),
    }
    options = {"causal": True, "return_lse": True}
    packed, lse = reference(q, k, v, **offsets, bias=bias, relative_bias=relative_bias, **options)
    for b in range(2):
        of_q, of_k = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        rows, keys = of_q.stop - of_q.start, of_k.stop - of_k.start
        diagonal = 4  # max_seqlen_q - 1
        biases = {
            "bias": bias[b : b + 1, :, :rows, :keys],
            "relative_bias": relative_bias[:, diagonal - rows + 1 : diagonal + keys],
        }
        alone = (x[its_rows].transpose(0, 1)[None] for x, its_rows in ((q, of_q), (k, of_k), (v, of_k)))
        out, expected_lse = reference(*alone, **biases, **options)
        torch.testing.assert_close(packed[of_q], out[0].transpose(0, 1))
        torch.testing.assert_close(lse[:, of_q], expected_lse[0])


def test_philox_known_answers():
    """Counter and key of zeros and ones, computed with Python's own integers."""

    def by_integers(counter, key):
        c, (k0, k1) = list(counter), key
        for _ in range(7):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
            k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
        return c

    for counter, key in (((0,) * 4, (0, 0)), ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2), ((1, 2, 3, 4), (5, 6))):
        words = philox.philox4x32(*(tuple(map(torch.tensor, x)) for x in (key, counter)))
        assert [int(word) for word in words] == by_integers(counter, key)


def test_drop_threshold_rounds_halves_up():
    assert [philox.drop_threshold(p / 65536) for p in (0, 0.25, 0.5, 1.5, 2.75)] == [0, 0, 1, 2, 3]
