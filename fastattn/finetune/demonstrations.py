"""Demonstrations for in-context learning: which texts, and how they and the questions become tokens.

    Text: <a training text>
    Label: <its label>
                                one such block per demonstration, then for the text in question
    Text: <the text>
    Label:

Whatever follows "Label:" as a continuation, one label after the other, is scored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastattn.finetune.datasets import Examples
from fastattn.finetune.encoding import stratified_sample
from fastattn.finetune.errors import UserInputError

__all__ = ["Verbaliser", "choose"]


def choose(train: Examples, shots: int, seed: int) -> Examples:
    """`shots` training texts, shuffled: the classes in proportion, each at least once if there is room."""
    if shots > len(train):
        raise UserInputError(f"--shots {shots} is more than the {len(train)} texts to draw from")
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(train))
    chosen = order[stratified_sample(np.asarray(train.labels)[order], shots)]
    chosen = generator.permutation(chosen)
    return Examples([train.texts[i] for i in chosen], [train.labels[i] for i in chosen])


@dataclass(frozen=True)
class Verbaliser:
    """Texts and labels as tokens; texts over `max_length` tokens are cut."""

    tokenizer: object
    label_names: list[str]
    max_length: int

    def prompt(self, demonstrations: Examples) -> list[int]:
        """Tokens of all demonstrations, behind the tokenizer's own first token where it has one."""
        bos = self.tokenizer.bos_token_id
        ids = [] if bos is None else [bos]
        for text, label in zip(demonstrations.texts, demonstrations.labels, strict=True):
            ids += self.query(text) + self.labels()[label] + self._ids("\n\n")
        return ids or self._ids("\n")  # no demonstration and no first token: something to begin with

    def query(self, text: str) -> list[int]:
        return (
            self._ids("Text:")
            + self._ids(" " + " ".join(text.split()))[: self.max_length]
            + self._ids("\nLabel:")
        )

    def labels(self) -> list[list[int]]:
        """For each label, what would follow the query."""
        ids = [self._ids(" " + name) for name in self.label_names]
        for name, label in zip(self.label_names, ids, strict=True):
            if not label:
                raise UserInputError(f"the tokenizer has no token for the label {name!r}")
            same = [other for other, its in zip(self.label_names, ids, strict=True) if its == label]
            if len(same) > 1:
                raise UserInputError(f"the tokenizer writes the labels {same[0]!r} and {same[1]!r} alike")
        return ids

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
