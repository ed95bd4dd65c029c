"""A training step of the packaged encoder on real texts: patched against each of transformers' own ways.

    python benchmarks/bench_step.py [--train head lora] [--dtypes float32 bfloat16] [--dropout] [--sorted]

Steps (forward and backward) are made on the same batches of 20 newsgroups by models with the same weights,
which take turns; medians are reported as ratios to the fastest of transformers' (eager, sdpa, compiled sdpa):

    auto   fastattn.patch(model), which computes some things again in backward rather than saving them
    all    fastattn.patch(model, recompute="all"), which computes all again that can be
    none   fastattn.patch(model, recompute="none")

Saved bytes are what autograd holds between forward and backward, the largest batch's, beside sdpa's. The
compiled model's are not compared: its graph saves otherwise, and it is there for its speed.
"""

from __future__ import annotations

import argparse
import warnings
from types import SimpleNamespace

import torch
import transformers
from torch import nn

from fastattn.bench.timing import interleaved_medians
from fastattn.finetune import encoding
from fastattn.finetune.datasets import load_task
from fastattn.finetune.measure import SavedBytes, machine
from fastattn.finetune.model import DEFAULT_MODEL, build_model, load_tokenizer, model_source

THEIRS = {"eager": "eager", "sdpa": "sdpa", "compiled": "sdpa"}
OURS = ("auto", "all", "none")
SORTED_POOL = 64  # batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--train", nargs="+", default=["head", "lora"], help="as of fastattn finetune")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--dropout", action="store_true", help="the model's own, 0.1, as people train it")
    parser.add_argument(
        "--sorted", action="store_true", help="texts of like length together: no padding to win"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=3, help="that are measured as one")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--without-compile", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=120, help="about how long to measure each line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    print(", ".join(f"{name} {value}" for name, value in machine().items()), f"torch {torch.__version__}")
    batches = real_batches(arguments)
    for train in arguments.train:
        for dtype in arguments.dtypes:
            measure(train, dtype, batches, arguments)


def real_batches(arguments: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    data = load_task("topics").train
    tokenizer = load_tokenizer(model_source(DEFAULT_MODEL))
    size = arguments.batch_size
    # Sorted, the batches lie evenly over texts of all lengths.
    count = size * max(arguments.batches, SORTED_POOL if arguments.sorted else 0)
    options = {"truncation": True, "max_length": arguments.max_length}
    ids = [tokenizer(text, **options)["input_ids"] for text in data.texts[:count]]
    rows = sorted(range(count), key=lambda row: len(ids[row])) if arguments.sorted else list(range(count))
    starts = [int((i + 0.5) * count / arguments.batches / size) * size for i in range(arguments.batches)]
    batches = []
    for chosen in (rows[start : start + size] for start in starts):
        batch = encoding.pad([ids[row] for row in chosen], tokenizer.pad_token_id, "right")
        batches.append(batch | {"labels": torch.tensor([data.labels[row] for row in chosen])})
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    padding = 1 - tokens / sum(batch["input_ids"].numel() for batch in batches)
    print(f"{len(batches)} batches of {size} texts, {tokens:,} tokens, {padding:.0%} padding")
    return batches


def measure(train: str, dtype: str, batches: list, arguments: argparse.Namespace) -> None:
    models = build(train, dtype, arguments)
    largest = max(batches, key=lambda batch: batch["attention_mask"].sum())

    def step(model: nn.Module) -> None:
        for batch in batches:
            model.zero_grad()
            model(**batch).loss.backward()

    for model in models.values():
        step(
            model
        )  # "auto" chooses by its first step; compiling happens twice, the second time for any length
    saved = {name: saved_bytes(models[name], largest) for name in models if name != "compiled"}
    steps = {name: lambda model=model: step(model) for name, model in models.items()}
    seconds = interleaved_medians(steps, arguments.seconds)
    best = min((name for name in models if name in THEIRS), key=seconds.get)
    print(f"\n{train} {dtype}{', dropout 0.1' if arguments.dropout else ''}: the fastest of theirs is {best}")
    for name in models:
        held = (
            f"saved {saved[name] / 2**20:7,.0f} MiB, {saved[name] / saved['sdpa']:.2f} of sdpa's"
            if name in saved
            else ""
        )
        print(
            f"  {name:8} {seconds[name]:7.3f} s, {seconds[best] / seconds[name]:5.2f} times as fast   {held}",
            flush=True,
        )


def build(train: str, dtype: str, arguments: argparse.Namespace) -> dict[str, nn.Module]:
    def one(attention: str, recompute: str = "auto") -> nn.Module:
        settings = SimpleNamespace(
            model=model_source(DEFAULT_MODEL),
            objective="classification",
            train=train,
            seed=0,
            backbone_dtype=dtype,
            mixed=False,
            recompute=recompute,
            feature_cache=None,
        )
        return build_model(
            settings, [str(i) for i in range(20)], attention, arguments.dropout, pad_id=0
        ).train()

    models = {name: one(attention) for name, attention in THEIRS.items()}
    if arguments.without_compile:
        del models["compiled"]
    else:
        models["compiled"] = torch.compile(models["compiled"])
    return models | {recompute: one("fastattn", recompute) for recompute in OURS}


def saved_bytes(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    counter = SavedBytes([*model.parameters(), *model.buffers()])
    with counter.counting():
        model(**batch)
    return counter.bytes


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
