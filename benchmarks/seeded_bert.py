"""A seeded BERT of MiniLM's kind; and, for any model, a training step and steps timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import peft
import torch
import transformers
from torch import nn


def build(
    train: str,
    dtype: torch.dtype,
    *,
    hidden: int = 384,
    layers: int = 6,
    hidden_dropout: float = 0.0,
    attention_dropout: float = 0.0,
) -> nn.Module:
    """An unpatched classifier whose head alone trains ("head"), or besides it adapters in fp32 ("lora")."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_labels=20,
        hidden_dropout_prob=hidden_dropout,
        attention_probs_dropout_prob=attention_dropout,
    )
    model = transformers.BertForSequenceClassification(config).to(dtype).train()
    if train == "head":
        model.bert.requires_grad_(False)
        return model
    adapters = peft.LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    return peft.get_peft_model(model, adapters)


def batch(lengths: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Texts of so many tokens, padded to the longest."""
    generator = torch.Generator().manual_seed(1)
    texts, longest = len(lengths), max(lengths)
    return {
        "input_ids": torch.randint(5, 30000, (texts, longest), generator=generator),
        "attention_mask": (torch.arange(longest) < torch.tensor(lengths)[:, None]).long(),
        "labels": torch.randint(0, 20, (texts,), generator=generator),
    }


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    model.zero_grad()
    model(**inputs).loss.backward()


def interleaved(
    steps: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each step by the clock and of the process's CPU time, round by round.

    They take turns, every other round in reverse; the first two rounds are not counted.
    """
    times = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name in steps if turn % 2 else reversed(steps):
            clock, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            times[name].append((time.perf_counter() - clock, time.process_time() - cpu))
    return {name: measured[2:] for name, measured in times.items()}
