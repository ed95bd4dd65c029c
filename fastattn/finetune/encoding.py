"""Texts to token ids, once per run: kept in one small file that every process of a comparison reads."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
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
    """Token ids of every text, back to back: text i is `ids[offsets[i]:offsets[i + 1]]`.

    Targets, of seq2seq alone, lie likewise; `labels` are the classes, or zeros where there are none.
    """

    ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    truncated: int
    target_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    target_offsets: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def tokens(self, i: int) -> np.ndarray:
        return self.ids[self.offsets[i] : self.offsets[i + 1]]

    def texts(self, rows) -> list[np.ndarray]:
        return [self.tokens(i) for i in rows]

    def targets(self, rows) -> list[np.ndarray]:
        return [self.target_ids[self.target_offsets[i] : self.target_offsets[i + 1]] for i in rows]

    def asked_tokens(self, rows) -> np.ndarray:
        """The tokens a language model has to foresee: those of the targets, or a text's own but the first."""
        has_targets = len(self.target_offsets) > 1
        return np.concatenate(self.targets(rows) if has_targets else [text[1:] for text in self.texts(rows)])


NO_LIMIT = 2**20  # tokens, in place of the astronomical numbers that stand for none
FIELDS = tuple(part.name for part in fields(Encoded))


def longest_allowed(tokenizer, config) -> int:
    """The model's limit in tokens, special ones included."""
    positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    # RoBERTa and its kin count positions from padding_idx + 1, so their table is longer than the limit.
    if config.model_type in ("roberta", "xlm-roberta", "camembert"):
        positions -= config.pad_token_id + 1
    return int(min(positions, tokenizer.model_max_length, NO_LIMIT))


def encode_dataset(
    dataset: Dataset, tokenizer, max_length: int, path: Path, ended: bool = False
) -> tuple[Encoded, Encoded]:
    """Encodes both parts and writes them to `path` (npz). Texts over `max_length` are cut and counted.

    Args:
        ended: texts that are not cut get the tokenizer's end token, so that a model learns to stop.
    """
    end = tokenizer.eos_token_id if ended else None
    parts = {name: _encode(getattr(dataset, name), tokenizer, max_length, end) for name in ("train", "test")}
    arrays = {f"{name}_{field}": getattr(part, field) for name, part in parts.items() for field in FIELDS}
    try:
        np.savez(path, **arrays)
    except OSError as error:
        raise UserInputError(f"could not write {path}: {error.strerror or error}") from error
    return parts["train"], parts["test"]


def load_encoded(path: Path) -> tuple[Encoded, Encoded]:
    with np.load(path, allow_pickle=False) as arrays:
        return tuple(Encoded(*(arrays[f"{name}_{field}"] for field in FIELDS)) for name in ("train", "test"))


def training_batch(count: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The rows of the step-th batch (from 0): a function of its arguments alone, so that runs can resume."""
    per_epoch = -(-count // batch_size)
    epoch, batch = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return order[batch * batch_size : (batch + 1) * batch_size]


def pad(texts: list[np.ndarray], pad_id: int, side: str) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of these texts, both (B, N) int64, padded to the longest of them."""
    longest = max(map(len, texts))
    ids = np.full((len(texts), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(texts), longest), dtype=np.int64)
    for row, text in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(longest - len(text), longest)
        ids[row, where], mask[row, where] = text, 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


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


def _encode(examples: Examples, tokenizer, max_length: int, end: int | None) -> Encoded:
    texts, truncated = _ids(examples.texts, tokenizer, max_length, end=end)
    labels = np.asarray(examples.labels, dtype=np.int64)
    if examples.targets is None:
        return Encoded(*_back_to_back(texts), labels, truncated)
    targets, cut = _ids(examples.targets, tokenizer, max_length, "text_target")
    return Encoded(*_back_to_back(texts), labels, truncated + cut, *_back_to_back(targets))


def _ids(
    texts: list[str], tokenizer, max_length: int, argument: str = "text", end: int | None = None
) -> tuple[list[list[int]], int]:
    """Ids of each text, at most `max_length`, and how many were cut."""
    ids = tokenizer(**{argument: texts}, truncation=False, verbose=False)["input_ids"]
    if end is not None:
        ids = [text if text[-1:] == [end] else [*text, end] for text in ids]
    long = [i for i, text in enumerate(ids) if len(text) > max_length]
    if long:
        # Cut by the tokenizer, which keeps the closing special token.
        cut = {argument: [texts[i] for i in long], "truncation": True, "max_length": max_length}
        for i, text in zip(long, tokenizer(**cut)["input_ids"], strict=True):
            ids[i] = text
    return ids, len(long)


def _back_to_back(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.concatenate([np.asarray(text, dtype=np.int32) for text in texts])
    return ids, np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
