"""Texts to token ids, once per run: kept in one small file that every process of a comparison reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastattn.finetune.datasets import Dataset, Examples
from fastattn.finetune.errors import UserInputError

__all__ = [
    "Encoded",
    "encode_dataset",
    "load_encoded",
    "longest_allowed",
    "pad",
    "stratified_sample",
    "training_batch",
]


@dataclass(frozen=True)
class Encoded:
    """Token ids of every text, back to back: text i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    truncated: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def tokens(self, i: int) -> np.ndarray:
        return self.ids[self.offsets[i] : self.offsets[i + 1]]


def longest_allowed(tokenizer, config) -> int:
    """The model's limit in tokens, special ones included."""
    positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    # RoBERTa and its kin count positions from padding_idx + 1, so their table is longer than the limit.
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= config.pad_token_id + 1
    return int(min(positions, tokenizer.model_max_length))


def encode_dataset(dataset: Dataset, tokenizer, max_length: int, path: Path) -> tuple[Encoded, Encoded]:
    """Encodes both parts and writes them to `path` (npz). Texts over `max_length` are cut and counted."""
    parts = {name: _encode(getattr(dataset, name), tokenizer, max_length) for name in ("train", "test")}
    arrays = {
        f"{name}_{field}": getattr(part, field)
        for name, part in parts.items()
        for field in ("ids", "offsets", "labels", "truncated")
    }
    try:
        np.savez(path, **arrays)
    except OSError as error:
        raise UserInputError(f"could not write {path}: {error.strerror}") from error
    return parts["train"], parts["test"]


def load_encoded(path: Path) -> tuple[Encoded, Encoded]:
    with np.load(path, allow_pickle=False) as arrays:
        return tuple(
            Encoded(*(arrays[f"{name}_{field}"] for field in ("ids", "offsets", "labels", "truncated")))
            for name in ("train", "test")
        )


def training_batch(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The rows of the step-th batch (from 0): a function of its arguments alone, so that runs can resume."""
    per_epoch = -(-count // batch_size)
    epoch, batch = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[batch * batch_size : (batch + 1) * batch_size]


def pad(part: Encoded, rows, pad_id: int, side: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The model's inputs for these texts, padded to the longest of them, and their labels."""
    texts = [part.tokens(i) for i in rows]
    longest = max(map(len, texts))
    ids = np.full((len(texts), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(texts), longest), dtype=np.int64)
    for row, text in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(longest - len(text), longest)
        ids[row, where], mask[row, where] = text, 1
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    return inputs, torch.from_numpy(part.labels[np.asarray(rows)])


def stratified_sample(labels: np.ndarray, count: int | None) -> np.ndarray:
    """`count` rows with the classes in proportion (each at least once), the same ones every time."""
    if count is None or count >= len(labels):
        return np.arange(len(labels))
    generator = np.random.default_rng(0)
    # Row r of a class of n gets the key (r + 1/2) / n: the smallest keys hold every class in proportion.
    keys = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        keys[members] = (np.arange(len(members)) + 0.5) / len(members)
        keys[members[0]] = 0
    return np.sort(np.argsort(keys, kind="stable")[:count])


def _encode(examples: Examples, tokenizer, max_length: int) -> Encoded:
    texts = tokenizer(examples.texts, truncation=False, verbose=False)["input_ids"]
    truncated = sum(len(text) > max_length for text in texts)
    if truncated:
        # Cut by the tokenizer, which keeps the closing special token.
        long = [i for i, text in enumerate(texts) if len(text) > max_length]
        cut = tokenizer([examples.texts[i] for i in long], truncation=True, max_length=max_length)[
            "input_ids"
        ]
        for i, text in zip(long, cut, strict=True):
            texts[i] = text
    ids = np.concatenate([np.asarray(text, dtype=np.int32) for text in texts])
    offsets = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
    return Encoded(ids, offsets, np.asarray(examples.labels, dtype=np.int64), truncated)
