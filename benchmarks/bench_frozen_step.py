"""What frozen layers' own ways bring to a training step of a patched BERT: interleaved medians, as ratios.

    python benchmarks/bench_frozen_step.py [--train head lora] [--dtypes bfloat16] [--hidden 384]

Each line is one of a patched model's settings, and how many times as fast as with none of them a step
(forward and backward) is, by the clock and (in brackets) by the process's CPU time:

    gelu      hf.intermediate: bias and GELU inside the product     head only, as no gradient passes there
    bias      frozen.Linear, bf16: the bias inside other products   head only
    lora      frozen.lora: x·W + b + s·(x·A)·B
    products  frozen.product, fp32: the project's kernel for all products with frozen weights, forward and
              backward, also on processors where torch's is taken

Adapters are fp32, r = 8 on query and value. The batch is padded to its longest text.
"""

from __future__ import annotations

import argparse
import functools
import statistics

import seeded_bert
import torch
from torch import nn

import fastattn
from fastattn.frozen import Linear
from fastattn.frozen import lora as frozen_lora
from fastattn.frozen import product as frozen_product
from fastattn.hf.intermediate import BertIntermediate

LENGTHS = (512, 300, 200, 150, 120, 100, 90, 80)  # as random batches of 20 newsgroups: 62% padding
_is_fused = Linear.is_fused
SWITCHES = {  # on, off
    "gelu": (BertIntermediate, "_is_fused", BertIntermediate._is_fused, lambda *_: False),
    "bias": (Linear, "is_fused", _is_fused, lambda self, x, gelu=False: gelu and _is_fused(self, x, gelu)),
    "lora": (frozen_lora.Linear, "_plain_adapter", frozen_lora.Linear._plain_adapter, lambda *_: None),
    "products": (frozen_product, "beats_torch", lambda: True, lambda: False),
}
SETTINGS = {
    ("head", "float32"): {"none": (), "gelu": ("gelu",), "gelu, products": ("gelu", "bias", "products")},
    ("head", "bfloat16"): {"none": (), "gelu": ("gelu",), "gelu, bias": ("gelu", "bias")},
    ("lora", "float32"): {"none": (), "lora": ("lora",), "lora, products": ("lora", "bias", "products")},
    ("lora", "bfloat16"): {"none": (), "lora": ("lora",)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--train", nargs="+", choices=["head", "lora"], default=["head", "lora"])
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
                model = seeded_bert.build(
                    train,
                    getattr(torch, dtype),
                    hidden=hidden,
                    layers=arguments.layers,
                    hidden_dropout=arguments.dropout,
                    attention_dropout=arguments.dropout,
                )
                fastattn.patch(model, padding_free=not arguments.padded and "auto")
                for texts in arguments.texts:
                    inputs = seeded_bert.batch((LENGTHS * texts)[:texts])
                    medians = measure(model, inputs, SETTINGS[train, dtype], arguments.rounds)
                    clock, cpu = medians.pop("none")
                    ratios = "  ".join(
                        f"{n} {clock / c:.2f} ({cpu / p:.2f})" for n, (c, p) in medians.items()
                    )
                    print(
                        f"{train} {dtype} {hidden}, {inputs['attention_mask'].sum()} tokens: {ratios}",
                        flush=True,
                    )


def measure(model: nn.Module, inputs: dict, settings: dict, rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of a step, by the clock and of CPU time."""

    def switched(on: tuple[str, ...]) -> None:
        for name, (owner, attribute, way, no_way) in SWITCHES.items():
            setattr(owner, attribute, way if name in on else no_way)
        seeded_bert.step(model, inputs)

    steps = {setting: functools.partial(switched, on) for setting, on in settings.items()}
    times = seeded_bert.interleaved(steps, rounds)
    return {name: tuple(map(statistics.median, zip(*all_, strict=True))) for name, all_ in times.items()}


if __name__ == "__main__":
    main()
