"""`fastattn icl`: labels texts with a causal language model that is shown some labelled ones, untrained."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fastattn.finetune.errors import UserInputError

__all__ = ["Result", "add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastattn.finetune.command import positive, seed

    parser.epilog = (
        "The labels' words are scored as continuations of the text, so the model must have learned "
        "language, and the larger the better. In parentheses: what holds unless you say otherwise."
    )
    parser.add_argument("--model", metavar="NAME_OR_DIR", required=True, help="a causal language model")
    texts = parser.add_argument_group("what to label")
    texts.add_argument(
        "--data", metavar="FILE", help="texts: .csv, .tsv, .jsonl or .parquet, UTF-8 (the task's test texts)"
    )
    texts.add_argument("--texts", type=positive, metavar="N", help="the first N of them (all)")
    shown = parser.add_argument_group("what the model is shown")
    shown.add_argument(
        "--demonstrations", metavar="FILE", help="labelled texts to draw from, in any of these forms"
    )
    shown.add_argument(
        "--task",
        choices=["sentiment", "topics", "reuters8", "reuters52"],
        help="or a built-in task's training texts",
    )
    shown.add_argument("--shots", type=positive, default=16, metavar="N", help="how many to show (16)")
    shown.add_argument("--seed", type=seed, default=0, metavar="N", help="which ones, and in what order (0)")
    shown.add_argument("--text-column", default="text", metavar="NAME", help="of the files (text)")
    shown.add_argument("--label-column", default="label", metavar="NAME", help="of the files (label)")
    shown.add_argument("--data-dir", metavar="DIR", help="where the built-in tasks' files are")
    shown.add_argument(
        "--max-length",
        type=positive,
        default=64,
        metavar="N",
        help="tokens of a text; longer ones are cut (64)",
    )
    how = parser.add_argument_group("how, and where to")
    how.add_argument("--batch-size", type=positive, default=32, metavar="N", help="texts at a time (32)")
    how.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="(float32)")
    how.add_argument("--out", metavar="FILE", help="also write them to a .csv or .jsonl file")


@dataclass(frozen=True)
class Result:
    """One text: the label found, its probability among the labels, and each label's log-likelihood."""

    text: str
    label: str | None  # the true one, where it is known
    predicted: str
    probability: float
    log_likelihoods: dict[str, float]


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    from fastattn.finetune import files
    from fastattn.finetune.progress import console

    out = None if arguments.out is None else Path(arguments.out)
    if out is not None and out.suffix.lower() not in (".csv", ".jsonl"):
        raise UserInputError(f"--out {out} must be a .csv or a .jsonl file")
    train, label_names, texts, labels, notes = _texts(arguments)
    results, prompt_tokens = _classify(arguments, train, label_names, texts, labels, notes)
    for result in results:
        print(result.predicted, f"{result.probability:.4f}", " ".join(result.text.split()), sep="\t")
    if out is not None:
        files.write_bytes(out, _as_csv(results) if out.suffix.lower() == ".csv" else _as_json_lines(results))
    console.print(
        f"{len(results):,} texts behind {arguments.shots} demonstrations ({prompt_tokens:,} tokens, "
        "computed and held once)."
    )
    for note in [*notes, *_quality(results)]:
        console.print(f"Note: {note}.")
    return 0


def _texts(arguments: argparse.Namespace):
    """Training examples, label names, the texts to label, their labels or None, and notes."""
    from fastattn.finetune import datasets

    columns = arguments.text_column, arguments.label_column
    if (arguments.demonstrations is None) == (arguments.task is None):
        raise UserInputError("give either --demonstrations FILE or --task, to draw demonstrations from")
    if arguments.data is None and arguments.task is None:
        raise UserInputError("--data FILE, the texts to label, is missing")
    notes: list[str] = []
    if arguments.task is not None:
        dataset = datasets.load_task(arguments.task, arguments.data_dir)
        train, label_names = dataset.train, dataset.label_names
        texts, labels = dataset.test.texts, [label_names[i] for i in dataset.test.labels]
    else:
        train, label_names = datasets.load_labelled(arguments.demonstrations, *columns, notes)
    if arguments.data is not None:
        texts, labels = datasets.load_texts(arguments.data, *columns, notes)
    count = arguments.texts or len(texts)
    return train, label_names, texts[:count], labels[:count] if labels else [None] * len(texts[:count]), notes


def _classify(arguments, train, label_names, texts, labels, notes) -> tuple[list[Result], int]:
    import torch

    import fastattn
    from fastattn.finetune import model as models
    from fastattn.finetune.demonstrations import Verbaliser, choose
    from fastattn.finetune.progress import Bar
    from fastattn.hf import SharedPrompt

    demonstrations = choose(train, arguments.shots, arguments.seed)
    tokenizer = models.load_tokenizer(arguments.model)
    model = models.load_causal_lm(arguments.model, arguments.dtype)
    verbaliser = Verbaliser(tokenizer, label_names, arguments.max_length)
    label_ids = verbaliser.labels()
    prompt = verbaliser.prompt(demonstrations)
    queries = [verbaliser.query(text) for text in texts]
    longest = len(prompt) + max(map(len, queries)) + max(map(len, label_ids)) - 1
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise UserInputError(
            f"{arguments.shots} demonstrations and the longest text are {longest} tokens, and "
            f"{arguments.model} reads {limit}; lower --shots or --max-length"
        )
    unshown = len(label_names) - len(set(demonstrations.labels))
    if unshown:
        notes.append(f"{unshown} of {len(label_names)} labels are in no demonstration; raise --shots")
    shared = SharedPrompt(fastattn.patch(model), prompt)
    by_length = sorted(range(len(queries)), key=lambda i: len(queries[i]))
    results: list = [None] * len(queries)
    with Bar("labelling", -(-len(queries) // arguments.batch_size)) as bar:
        for start in range(0, len(queries), arguments.batch_size):
            rows = by_length[start : start + arguments.batch_size]
            scores = shared.classify([queries[i] for i in rows], label_ids)
            for row, score, p in zip(rows, scores.tolist(), torch.softmax(scores, 1).tolist(), strict=True):
                best = max(range(len(p)), key=p.__getitem__)
                each = {name: round(value, 4) for name, value in zip(label_names, score, strict=True)}
                results[row] = Result(texts[row], labels[row], label_names[best], p[best], each)
            bar.advance()
    return results, len(prompt)


def _quality(results: list[Result]) -> list[str]:
    """Accuracy where labels are known, and an honest word where it is nothing."""
    known = [result for result in results if result.label is not None]
    if not known:
        return []
    right = sum(result.predicted == result.label for result in known)
    most, largest = Counter(result.label for result in known).most_common(1)[0]
    said = [
        f"accuracy {right / len(known):.1%} on {len(known):,} labelled texts (always {most!r}: "
        f"{largest / len(known):.1%})"
    ]
    if right <= largest:
        said.append(
            "that is no better than always naming the largest class: this model does not do the task this "
            "way; a larger language model might, and `fastattn finetune` trains one that does"
        )
    return said


def _as_csv(results: list[Result]) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    labelled = any(result.label is not None for result in results)
    writer.writerow(["text", *(["label"] if labelled else []), "predicted", "probability"])
    for result in results:
        label = [result.label] if labelled else []
        writer.writerow([result.text, *label, result.predicted, f"{result.probability:.6f}"])
    return file.getvalue().encode()


def _as_json_lines(results: list[Result]) -> bytes:
    lines = []
    for result in results:
        row = {
            "text": result.text,
            "predicted": result.predicted,
            "probability": round(result.probability, 6),
        }
        if result.label is not None:
            row["label"] = result.label
        lines.append(
            json.dumps({**row, "log_likelihoods": result.log_likelihoods}, ensure_ascii=False) + "\n"
        )
    return "".join(lines).encode()
