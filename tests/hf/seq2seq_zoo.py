"""Encoder-decoder models of the zoo, and batches for them whose two sides differ in length."""

import torch
from torch import nn
from zoo import VOCAB, ZOO, batch, recordings, specimen

FAMILIES = tuple(name for name, kind in ZOO.items() if kind.kind in ("encoder-decoder", "speech"))
TEXT = tuple(name for name in FAMILIES if ZOO[name].kind == "encoder-decoder")


def seq2seq(family: str, head: str | None = None, **changes) -> nn.Module:
    """A small model in eval mode, unpatched, with eager attention: one that generates, or "ForThat"."""
    prefix = ZOO[family].config.removesuffix("Config")
    return specimen(family, None if head is None else prefix + head, **changes)


def sources(family: str, padding: str = "right", size: int = 5) -> dict[str, torch.Tensor]:
    """What the encoder is given: tokens and their mask, or, for Whisper, recordings."""
    if ZOO[family].kind == "speech":
        return recordings(size)
    inputs = batch(padding, size=size)
    return {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 0)}


def targets(size: int = 5, length: int = 11, seed: int = 1) -> torch.Tensor:
    """(B, N) labels of different lengths, -100 behind them, as collators make them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, VOCAB, (size, length), generator=generator)
    for row in range(1, size):
        labels[row, length - 1 - (row * 3) % (length - 1) :] = -100
    return labels


def run_seq2seq(model: nn.Module, inputs: dict, **options) -> dict[str, torch.Tensor]:
    """Logits at labelled positions, loss, and every gradient, by name: for zoo.deviation."""
    model.zero_grad(set_to_none=True)
    out = model(**inputs, **options)
    out.loss.backward()
    result = {"logits": out.logits[inputs["labels"] != -100].detach(), "loss": out.loss.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            result[f"grad {name}"] = parameter.grad.clone()
    return result
