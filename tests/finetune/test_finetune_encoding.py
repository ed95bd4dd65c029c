"""Batches are a function of the seed and the step; padding and truncation are what they say."""

import numpy as np
import pytest
import torch

from fastattn.finetune import encoding
from fastattn.finetune.datasets import load_file


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, tiny_model, table):
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("encoded") / "texts.npz"
    dataset = load_file(table, "text", "label")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return dataset, tokenizer, encoding.encode_dataset(dataset, tokenizer, 20, path), path


def test_encoding_is_the_tokenizers_own_with_truncation(encoded):
    dataset, tokenizer, (train, test), path = encoded
    for part, examples in ((train, dataset.train), (test, dataset.test)):
        expected = tokenizer(examples.texts, truncation=True, max_length=20)["input_ids"]
        assert [part.tokens(i).tolist() for i in range(len(part))] == expected
        full = tokenizer(examples.texts)["input_ids"]
        assert part.truncated == sum(len(ids) > 20 for ids in full)
    assert train.truncated > 0
    for part, again in zip((train, test), encoding.load_encoded(path), strict=True):
        assert (part.ids == again.ids).all()
        assert (part.labels == again.labels).all()


@pytest.mark.parametrize(("count", "size"), [(10, 3), (9, 3), (1, 4), (16, 16)])
def test_an_epoch_takes_every_text_once(count, size):
    steps = -(-count // size)
    for epoch in range(2):
        rows = [encoding.training_batch(count, size, 7, epoch * steps + i) for i in range(steps)]
        assert sorted(np.concatenate(rows).tolist()) == list(range(count))


def test_the_order_depends_on_seed_and_epoch():
    orders = {tuple(encoding.training_batch(50, 50, seed, step)) for seed in range(2) for step in range(2)}
    assert len(orders) == 4


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(encoded, side):
    train = encoded[2][0]
    rows = [4, 0, 7]
    inputs = encoding.pad(train.texts(rows), 3, side)
    assert inputs["input_ids"].shape == (3, max(train.lengths[rows]))
    for i, row in enumerate(rows):
        mask = inputs["attention_mask"][i].bool()
        assert inputs["input_ids"][i][mask].tolist() == train.tokens(row).tolist()
        assert (inputs["input_ids"][i][~mask] == 3).all()
        assert mask[0 if side == "right" else -1]
    assert {tensor.dtype for tensor in inputs.values()} == {torch.int64}


def test_a_stratified_sample_keeps_proportions_and_every_class():
    labels = np.repeat([0, 1, 2], [900, 95, 5])
    rows = encoding.stratified_sample(labels, 100)
    counts = np.bincount(labels[rows])
    assert counts.sum() == 100
    assert abs(counts[0] - 90) <= 2
    assert counts[2] >= 1
    assert (rows == encoding.stratified_sample(labels, 100)).all()
    assert len(encoding.stratified_sample(labels, None)) == 1000
    assert set(labels[encoding.stratified_sample(labels, 3)]) == {0, 1, 2}


def test_the_longest_text_a_model_can_read(tiny_model):
    from transformers import AutoTokenizer, BertConfig, RobertaConfig

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert encoding.longest_allowed(tokenizer, BertConfig(max_position_embeddings=20)) == 20
    assert (
        encoding.longest_allowed(tokenizer, RobertaConfig(max_position_embeddings=20, pad_token_id=1)) == 18
    )
    assert encoding.longest_allowed(tokenizer, BertConfig(max_position_embeddings=512)) == 32
