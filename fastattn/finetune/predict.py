"""`fastattn predict`: for each text a label and its probability, or what a language model writes."""

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
NEW_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastattn.finetune.command import positive

    parser.add_argument("model", metavar="DIR", help="a saved model, such as runs/reuters8-head/model")
    parser.add_argument(
        "texts",
        nargs="*",
        default=[],
        metavar="TEXT",
        help="what to label (without: --file, or standard input)",
    )
    parser.add_argument("--file", metavar="FILE", help="one text per line, UTF-8")
    parser.add_argument(
        "--json", action="store_true", help="print JSON lines instead of label, probability, text"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive,
        default=NEW_TOKENS,
        metavar="N",
        help=f"that a language model writes at most ({NEW_TOKENS})",
    )
    parser.add_argument(
        "--attention", choices=ARMS, default="fastattn", help="what computes attention (fastattn)"
    )


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    texts = _texts(arguments)
    answers, refused = predict(arguments.model, texts, arguments.attention, arguments.max_new_tokens)
    if refused:
        print(f"fastattn predict: not patched: {refused}", file=sys.stderr)
    for text, answer in zip(texts, answers, strict=True):
        if arguments.json:
            answer = {k: round(v, 6) if isinstance(v, float) else v for k, v in answer.items()}
            print(json.dumps({**answer, "text": text}, ensure_ascii=False))
        else:
            columns = [f"{v:.4f}" if isinstance(v, float) else v for v in answer.values()]
            print(*(" ".join(column.split()) for column in (*columns, text)), sep="\t")
    return 0


def predict(
    directory: str, texts: list[str], attention: str, most: int = NEW_TOKENS
) -> tuple[list[dict], str | None]:
    """For each text its label and probability, or what a language model writes in answer to it or behind it
    (at most `most` tokens); and why the model was not patched, if so."""
    from fastattn.finetune import model as models
    from fastattn.finetune.encoding import longest_allowed

    _check_model(Path(directory))
    tokenizer = models.load_tokenizer(directory)
    model, objective, refused = models.load_saved(directory, attention)
    longest = longest_allowed(tokenizer, model.config) - _virtual_tokens(model)
    if objective.name == "causal-lm":
        tokenizer.padding_side = "left"  # what is written stands behind the text
        longest -= most
    if longest < 1:
        raise UserInputError(f"--max-new-tokens {most} leaves {directory} no token to read")
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
            if objective.is_language:
                for row, words in zip(rows, models.write(model, tokenizer, inputs, most), strict=True):
                    results[row] = {"generated": words}
                continue
            probability, label = model(**inputs).logits.float().softmax(-1).max(-1)
            for row, i, p in zip(rows, label.tolist(), probability.tolist(), strict=True):
                results[row] = {"label": model.config.id2label[i], "probability": p}
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
