"""What frozen layers' own ways bring to a training step of a patched BERT: interleaved medians, as ratios.

    python benchmarks/bench_frozen_step.py [--train head lora] [--dtypes bfloat16] [--hidden 384]

Each line is one of a patched model's settings, and how many times as fast as with none of them a step
(forward and backward) is, by the clock and (in brackets) by the process's CPU time:

    bias    frozen.Linear: the bias inside the product     head only, as no gradient passes there
    both    the same and hf.intermediate: GELU as well     head only
    lora    frozen.lora: x·W + b + s·(x·A)·B

Adapters are fp32, r = 8 on query and value. The batch is padded to its longest text.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import peft
import torch
import transformers
from torch import nn

import fastattn
from fastattn.frozen import Linear
from fastattn.frozen import lora as frozen_lora
from fastattn.hf.intermediate import BertIntermediate

LENGTHS = (512, 300, 200, 150, 120, 100, 90, 80)  # as random batches of 20 newsgroups: 62% padding
SWITCHES = {
    "bias": (Linear, "is_fused", lambda *_: False),
    "gelu": (BertIntermediate, "_is_fused", lambda *_: False),
    "lora": (frozen_lora.Linear, "_plain_adapter", lambda *_: None),
}
SETTINGS = {
    "head": {"none": (), "bias": ("bias",), "both": ("bias", "gelu")},
    "lora": {"none": (), "lora": ("lora",)},
}
_ways = {name: getattr(cls, method) for name, (cls, method, _) in SWITCHES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--train", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--hidden", type=int, nargs="+", default=[384], help="384: MiniLM; 768: BERT-base")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--texts", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--padded", action="store_true", help="padding_free=False")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, threads {arguments.threads}"
    )
    for train in arguments.train:
        for dtype in arguments.dtypes:
            for hidden in arguments.hidden:
                model = build(train, getattr(torch, dtype), hidden, arguments)
                for texts in arguments.texts:
                    inputs = batch(texts)
                    medians = measure(
                        functools.partial(step, model, inputs), SETTINGS[train], arguments.rounds
                    )
                    clock, cpu = medians.pop("none")
                    ratios = "  ".join(
                        f"{n} {clock / c:.2f} ({cpu / p:.2f})" for n, (c, p) in medians.items()
                    )
                    print(
                        f"{train} {dtype} {hidden}, {inputs['attention_mask'].sum()} tokens: {ratios}",
                        flush=True,
                    )


def build(train: str, dtype: torch.dtype, hidden: int, arguments: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=arguments.layers,
        num_labels=20,
        hidden_dropout_prob=arguments.dropout,
        attention_probs_dropout_prob=arguments.dropout,
    )
    model = transformers.BertForSequenceClassification(config).to(dtype)
    if train == "head":
        model.bert.requires_grad_(False)
    else:
        adapters = peft.LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
        model = peft.get_peft_model(model, adapters)
    return fastattn.patch(model, padding_free=not arguments.padded and "auto")


def batch(texts: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor((LENGTHS * texts)[:texts])
    return {
        "input_ids": torch.randint(5, 30000, (texts, 512), generator=generator),
        "attention_mask": (torch.arange(512) < lengths[:, None]).long(),
        "labels": torch.randint(0, 20, (texts,), generator=generator),
    }


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    model.zero_grad()
    model(**inputs).loss.backward()


def measure(step: Callable[[], None], settings: dict, rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of a step, by the clock and of CPU time; settings take turns."""
    times = {setting: [] for setting in settings}
    for turn in range(rounds + 1):
        for setting, switched_on in settings.items():
            for name, (cls, method, off) in SWITCHES.items():
                setattr(cls, method, _ways[name] if name in switched_on else off)
            clock, cpu = time.perf_counter(), time.process_time()
            step()
            if turn:
                times[setting].append((time.perf_counter() - clock, time.process_time() - cpu))
    return {name: tuple(map(statistics.median, zip(*all_, strict=True))) for name, all_ in times.items()}


if __name__ == "__main__":
    main()
