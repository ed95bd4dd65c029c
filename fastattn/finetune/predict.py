"""`fastattn predict`: a label and its probability for each text."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from fastattn.finetune.errors import UserInputError
from fastattn.finetune.settings import ARMS

__all__ = ["add_arguments", "predict", "run"]

BATCH = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="a saved model, such as runs/reuters8-head/model")
    parser.add_argument(
        "texts", nargs="*", metavar="TEXT", help="what to label (without: --file, or standard input)"
    )
    parser.add_argument("--file", metavar="FILE", help="one text per line, UTF-8")
    parser.add_argument(
        "--json", action="store_true", help="print JSON lines instead of label, probability, text"
    )
    parser.add_argument(
        "--attention", choices=ARMS, default="fastattn", help="what computes attention (fastattn)"
    )


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    texts = _texts(arguments)
    labels, refused = predict(arguments.model, texts, arguments.attention)
    if refused:
        print(f"fastattn predict: not patched: {refused}", file=sys.stderr)
    for text, (label, probability) in zip(texts, labels, strict=True):
        if arguments.json:
            print(
                json.dumps(
                    {"label": label, "probability": round(probability, 6), "text": text}, ensure_ascii=False
                )
            )
        else:
            print(label, f"{probability:.4f}", " ".join(text.split()), sep="\t")
    return 0


def predict(directory: str, texts: list[str], attention: str) -> tuple[list[tuple[str, float]], str | None]:
    """Label and probability for each text, in order; and why the model was not patched, if so."""
    from fastattn.finetune import model as models
    from fastattn.finetune.encoding import longest_allowed

    _check_model(Path(directory))
    tokenizer = models.load_tokenizer(directory)
    model, refused = models.load_classifier(directory, attention)
    longest = longest_allowed(tokenizer, model.config) - _virtual_tokens(model)
    results: list = [None] * len(texts)
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    with torch.no_grad():
        for start in range(0, len(texts), BATCH):
            rows = by_length[start : start + BATCH]
            inputs = tokenizer(
                [texts[i] for i in rows],
                truncation=True,
                max_length=longest,
                padding=True,
                return_tensors="pt",
            )
            probability, label = model(**inputs).logits.float().softmax(-1).max(-1)
            for row, i, p in zip(rows, label.tolist(), probability.tolist(), strict=True):
                results[row] = (model.config.id2label[i], p)
    return results, refused


def _check_model(directory: Path) -> None:
    from fastattn.finetune.model import ADAPTER_CONFIG, BASE

    if (directory / ADAPTER_CONFIG).is_file():
        if not (directory / BASE / "config.json").is_file():
            raise UserInputError(f"{directory} holds an adapter alone; give the folder model/ beside it")
    elif not (directory / "config.json").is_file():
        raise UserInputError(f"{directory} holds no saved model: it has no config.json")


def _virtual_tokens(model) -> int:
    return getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0)


def _texts(arguments: argparse.Namespace) -> list[str]:
    if arguments.texts and arguments.file:
        raise UserInputError("texts are given both as arguments and by --file; give one")
    if arguments.texts:
        return arguments.texts
    name = arguments.file or "standard input"
    try:
        content = Path(arguments.file).read_bytes() if arguments.file else sys.stdin.buffer.read()
    except OSError as error:
        raise UserInputError(f"{name} cannot be read: {error.strerror}") from error
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserInputError(f"{name} is not UTF-8 (at byte {error.start})") from error
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise UserInputError(f"{name} is empty")
    return texts
