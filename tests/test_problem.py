"""Bad input: an InvalidArgumentError that names the argument, before anything is computed."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

import fastattn
from fastattn import dispatch, errors
from fastattn.problem import AttentionInputs, check_offsets, describe

F32, INT32 = torch.float32, torch.int32


def rand(*shape, dtype=F32):
    return torch.randn(shape).to(dtype)


Q, K, V = rand(2, 4, 5, 16), rand(2, 2, 7, 16), rand(2, 2, 7, 8)
PADDED = {
    "q": [[1.0], rand(4, 5, 16), rand(2, 3, 5, 16), rand(2, 4, 5, 16, dtype=torch.int64), rand(2, 4, 5, 300)],
    "k": [
        None,
        rand(3, 2, 7, 16),
        rand(2, 2, 7, 17),
        rand(2, 2, 7, 16, dtype=torch.float16),
        rand(2, 0, 7, 16),
    ],
    "v": [rand(2, 2, 6, 8), rand(2, 1, 7, 8), rand(1, 2, 7, 8), rand(2, 2, 7, 257), rand(2, 2, 7, 0)],
    "key_mask": [rand(2, 7), torch.ones(2, 8, dtype=torch.bool), torch.ones(7, dtype=torch.bool), "mask"],
    "bias": [rand(3, 1, 5, 7), rand(5, 8), rand(1, 2, 4, 5, 7), torch.ones(5, 7, dtype=torch.bool)],
    "relative_bias": [rand(4, 12), rand(1, 11), rand(11)],
    "alibi_slopes": [rand(2), rand(4, 2), torch.ones(4, dtype=torch.int64)],
    "window": [3, (1,), (-1, 2), (1.5, 2), [1, True]],
    "scale": ["1", math.inf, math.nan, torch.tensor(1.0), True],
    "softcap": [-1.0, math.inf, "2"],
    "dropout_p": [-0.1, 1.0, 1.5, math.nan, 1 - 1e-7, "0.1"],
    "backend": ["gpu", None, ["cpu"]],
}


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_padded(name, backend, monkeypatch):
    monkeypatch.setattr(dispatch, "choose", lambda *_: pytest.fail("validation let it pass"))
    for value in PADDED[name]:
        arguments = {"q": Q, "k": K, "v": V, "backend": backend, name: value}
        with pytest.raises(errors.InvalidArgumentError) as caught:
            fastattn.attention(**arguments)
        # A wrong q shows where k no longer fits it.
        assert caught.value.argument in ((name, "k") if name == "q" else (name,))
        assert caught.value.argument in str(caught.value)
        assert caught.value.allowed in str(caught.value)


@pytest.mark.parametrize("seed", ["a", 1.5, 2**64, -(2**63) - 1, torch.tensor(1.0), torch.tensor([1, 2])])
def test_seed(seed):
    with pytest.raises(errors.InvalidArgumentError) as caught:
        fastattn.attention(Q, K, V, dropout_p=0.1, seed=seed, backend="reference")
    assert caught.value.argument == "seed"


OFFSETS = torch.tensor([0, 3, 8], dtype=INT32)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("cu_seqlens_q", {"cu_seqlens_q": OFFSETS.long(), "max_seqlen_q": 5}),
        ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, 5, 3], dtype=INT32), "max_seqlen_q": 8}),
        ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([0, 5, 9], dtype=INT32), "max_seqlen_q": 8}),
        ("cu_seqlens_q", {"cu_seqlens_q": torch.tensor([-1, 5, 8], dtype=INT32), "max_seqlen_q": 8}),
        ("cu_seqlens_q", {"cu_seqlens_q": [0, 8]}),
        ("max_seqlen_q", {"max_seqlen_q": 4}),
        ("max_seqlen_q", {"max_seqlen_q": -1}),
        ("max_seqlen_k", {"max_seqlen_k": 2, "max_seqlen_q": 5}),
        ("cu_seqlens_k", {"cu_seqlens_k": torch.tensor([0, 8], dtype=INT32)}),
        ("v", {"v": rand(7, 2, 16)}),
        ("q", {"q": rand(1, 8, 4, 16)}),
        ("bias", {"bias": rand(2, 4, 8, 8)}),
    ],
)
def test_packed(cpu, backend, name, more):
    arguments = {"q": rand(8, 4, 16), "k": rand(8, 2, 16), "v": rand(8, 2, 16), "cu_seqlens_q": OFFSETS}
    arguments = {**arguments, "cu_seqlens_k": OFFSETS, "backend": backend, **more}
    with pytest.raises(errors.InvalidArgumentError) as caught:
        fastattn.varlen_attention(**arguments)
    assert caught.value.argument == name


def test_what_equals_a_valid_value_is_not_taken_for_it():
    """True == 1.0, also as a key of what is remembered between calls."""
    fastattn.attention(Q, K, V, scale=1.0, backend="reference")
    with pytest.raises(errors.InvalidArgumentError):
        fastattn.attention(Q, K, V, scale=True, backend="reference")


def test_devices_are_compared():
    with pytest.raises(errors.InvalidArgumentError, match="on meta"):
        fastattn.attention(Q, K.to("meta"), V, backend="reference")


def test_the_same_problem_is_described_once():
    options = (False, 0.25, -1, -1, 0.0, 0.0, 0, 0)
    first = describe(AttentionInputs(Q, K, V), options, False)
    assert describe(AttentionInputs(Q + 1, K, V), options, False) is first
    assert describe(AttentionInputs(Q, K, V), options, True) is not first
    assert describe(AttentionInputs(Q.double(), K.double(), V.double()), options, False) is not first
    masked = describe(AttentionInputs(Q, K, V, torch.ones(2, 7, dtype=torch.bool)), options, False)
    assert masked is not first
    assert masked.has_key_mask


def test_offsets_as_integers():
    assert check_offsets("cu_seqlens_q", OFFSETS, 8, 5) == [0, 3, 8]


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidArgumentError("scale", math.inf, "a finite number"),
        errors.UnsupportedError("nobody can", {"cpu": "no"}, "do that"),
        errors.BackendUnavailableError("cuda", "no GPU"),
        errors.MissingDependencyError("transformers", "hf"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling(error):
    """They cross process borders, out of DataLoader workers for one."""
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is type(error)
    assert str(copied) == str(error)
    assert vars(copied) == vars(error)


def test_errors_are_builtin_errors_too():
    assert issubclass(errors.InvalidArgumentError, ValueError)
    assert issubclass(errors.UnsupportedError, NotImplementedError)
    assert issubclass(errors.BackendUnavailableError, RuntimeError)
    assert issubclass(errors.MissingDependencyError, ImportError)
    assert issubclass(errors.UnsupportedModelError, TypeError)
