"""Everything that decides what a run computes. Saved with it, so that --resume continues the same run."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

from fastattn.finetune.errors import UserInputError

__all__ = [
    "ARMS",
    "METHODS",
    "OBJECTIVES",
    "VIRTUAL_TOKENS",
    "Settings",
    "check_dtypes",
    "check_feature_cache",
    "check_method",
    "check_objective",
    "default_lr",
]

ARMS = ("fastattn", "sdpa", "eager")  # how attention is computed: patched, or one of transformers' own ways
OBJECTIVES = ("classification", "seq2seq", "causal-lm")
METHODS = "head, lora, prefix, prompt, bitfit, ln, last-N (last-2 trains the last two layers), full"
VIRTUAL_TOKENS = 20  # that prefix and prompt put before each text
LEARNING_RATES = {
    "head": 5e-3,
    "lora": 2e-3,
    "prefix": 1e-2,
    "prompt": 1e-2,
    "bitfit": 2e-3,
    "ln": 2e-3,
    "full": 5e-5,
}
WARM_UP = (
    0.1  # share of the steps during which the learning rate rises; after it, it falls to zero, both linearly
)


@dataclass(frozen=True)
class Settings:
    model: str
    task: str | None
    data: str | None
    test_data: str | None
    text_column: str
    label_column: str
    data_dir: str | None
    objective: str
    target_column: str
    train: str
    attention: str
    recompute: str
    feature_cache: str | None  # a folder for the frozen backbone's features
    dtype: str  # of what is trained
    backbone_dtype: str  # of what is frozen
    epochs: int
    steps: int | None  # given, it takes the place of epochs
    batch_size: int
    max_length: int | None  # None: the model's limit
    lr: float
    seed: int
    compare: bool
    compare_steps: int
    test_texts: int | None  # None: the whole test set

    def total_steps(self, training_texts: int) -> int:
        return self.steps or self.epochs * math.ceil(training_texts / self.batch_size)

    @property
    def mixed(self) -> bool:
        """Whether the frozen weights have fewer bits than the trained ones."""
        return self.backbone_dtype != self.dtype

    @property
    def virtual_tokens(self) -> int:
        """Positions of the model's that its texts cannot have."""
        return VIRTUAL_TOKENS if self.train in ("prefix", "prompt") else 0

    def learning_rate(self, step: int, total: int) -> float:
        """For the step-th update, counted from 0."""
        warm_up = max(1, round(total * WARM_UP))
        return self.lr * min((step + 1) / warm_up, (total - step) / max(1, total - warm_up + 1))

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, saved: dict) -> Settings:
        names = {field.name for field in dataclasses.fields(cls)}
        if set(saved) != names:
            raise UserInputError("the saved settings are of another version of fastattn; start the run anew")
        return cls(**saved)


def check_dtypes(method: str, dtype: str, backbone_dtype: str) -> None:
    """Frozen weights may have fewer bits than the trained ones, where there are frozen weights."""
    if backbone_dtype == dtype:
        return
    if dtype == "bfloat16":
        raise UserInputError(
            f"--backbone-dtype {backbone_dtype} with --dtype {dtype} rounds what learns and not what is "
            "frozen; leave one out"
        )
    if method == "full":
        raise UserInputError(
            f"--backbone-dtype {backbone_dtype}: --train full leaves nothing frozen; "
            f"--dtype {backbone_dtype} rounds everything"
        )


def check_objective(objective: str, given: dict) -> None:
    """The options that go with one objective alone, and the model that only classification has."""
    for option, its in (("label_column", "classification"), ("target_column", "seq2seq")):
        if option in given and objective != its:
            raise UserInputError(f"--{option.replace('_', '-')} goes with --objective {its}")
    if objective != "classification" and "model" not in given:
        raise UserInputError(
            f"--objective {objective} needs --model, a language model; "
            "examples/small_language_model.py makes one"
        )


def check_feature_cache(values: dict) -> None:
    """Features are computed once where no trained weight shapes them, and each text has one."""
    if values["feature_cache"] is None:
        return
    if values["train"] != "head" or values["objective"] != "classification":
        raise UserInputError(
            "--feature-cache goes with --train head and --objective classification: with --train "
            f"{values['train']} and {values['objective']} no features stay the same"
        )
    if values["compare"]:
        raise UserInputError(
            "--feature-cache leaves out the backbone, whose steps --compare compares; give one"
        )


def check_method(method: str) -> str:
    """The method itself, or an error that lists what there is."""
    if method in LEARNING_RATES or re.fullmatch(r"last-[1-9]\d*", method):
        return method
    raise UserInputError(f"--train {method} is none of {METHODS}")


def default_lr(method: str) -> float:
    """Few trained parameters bear, and in a short run need, a far larger rate than many."""
    return LEARNING_RATES.get(method, 1e-4)
