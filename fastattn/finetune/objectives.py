"""What a run teaches a model: to name a class, to answer a text with another, or to go on with a text.

An objective turns rows of the encoded texts into a batch, and a model's output into logits that lie beside
the labels: (B, classes) and (B,), or (B, N, vocabulary) and (B, N) with -100 where nothing is asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastattn.finetune.encoding import Encoded, pad
from fastattn.finetune.errors import UserInputError

__all__ = ["IGNORED", "OBJECTIVES", "Batch", "Objective", "of_config"]

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    inputs: dict[str, Tensor]
    labels: Tensor
    tokens: int  # that are read or written
    padded_tokens: int  # the same with padding


@dataclass(frozen=True)
class Objective:
    """Classification; the two others differ from it where they say so."""

    name: str
    auto_class: str
    peft_task: str
    is_language = False

    def batch(self, part: Encoded, rows, tokenizer) -> Batch:
        inputs = pad(part.texts(rows), tokenizer.pad_token_id, tokenizer.padding_side)
        return self._batch(inputs, torch.from_numpy(part.labels[rows]))

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(**batch.inputs).logits

    @staticmethod
    def _batch(inputs: dict[str, Tensor], labels: Tensor) -> Batch:
        masks = [mask for name, mask in inputs.items() if name.endswith("attention_mask")]
        tokens = sum(int(mask.sum()) for mask in masks)
        return Batch(inputs, labels, tokens, sum(mask.numel() for mask in masks))


@dataclass(frozen=True)
class Seq2Seq(Objective):
    is_language = True

    def batch(self, part: Encoded, rows, tokenizer) -> Batch:
        inputs = pad(part.texts(rows), tokenizer.pad_token_id, "right")
        targets = pad(part.targets(rows), tokenizer.pad_token_id, "right")
        mask = targets["attention_mask"]
        labels = targets["input_ids"].masked_fill(mask == 0, IGNORED)
        # Its mask tells a patched decoder where each target ends.
        return self._batch({**inputs, "decoder_attention_mask": mask}, labels)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        before = model.prepare_decoder_input_ids_from_labels(labels=batch.labels)
        return model(**batch.inputs, decoder_input_ids=before, use_cache=False).logits


@dataclass(frozen=True)
class CausalLM(Objective):
    is_language = True

    def batch(self, part: Encoded, rows, tokenizer) -> Batch:
        inputs = pad(part.texts(rows), tokenizer.pad_token_id, "right")
        hidden = inputs["attention_mask"] == 0
        return self._batch(inputs, inputs["input_ids"].masked_fill(hidden, IGNORED)[:, 1:])

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(**batch.inputs, use_cache=False).logits
        return logits[:, logits.shape[1] - batch.labels.shape[1] - 1 : -1]  # virtual tokens come first


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective("classification", "AutoModelForSequenceClassification", "SEQ_CLS"),
        Seq2Seq("seq2seq", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
        CausalLM("causal-lm", "AutoModelForCausalLM", "CAUSAL_LM"),
    )
}


def of_config(config, directory: str) -> Objective:
    """What the model saved in `directory` was made for, by the class named in its config."""
    name = next(iter(config.architectures or ()), f"{config.model_type} model")
    if name.endswith("ForSequenceClassification"):
        return OBJECTIVES["classification"]
    if config.is_encoder_decoder and name.endswith(("ForConditionalGeneration", "MTModel")):
        return OBJECTIVES["seq2seq"]
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return OBJECTIVES["causal-lm"]
    raise UserInputError(f"{directory} holds a {name}, which neither labels nor writes; fine-tune it first")
