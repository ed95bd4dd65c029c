"""What a patched BERT's hidden-state dropout costs a training step, and what fusing it could save at most.

    python benchmarks/bench_hidden_dropout.py [--train lora head] [--dtypes float32] [--rounds 12]

"step" is a step with hidden dropout 0.1 over one without, attention's dropout in both; "fused" what would be
left of that excess if dropout + residual took no longer than dropout alone, forward and backward. Medians of
interleaved rounds, CPU time of the process, MiniLM's size (6 x 384/1536), LoRA r = 8 on query and value.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable

import seeded_bert
import torch

import fastattn
from fastattn.frozen.dropout import Dropout

LENGTHS = (512, 300, 120, 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--train", nargs="+", choices=["lora", "head"], default=["lora", "head"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, threads {arguments.threads}"
    )
    for name in arguments.dtypes:
        dtype = getattr(torch, name)
        share = added_pass(dtype, arguments.rounds)
        for train in arguments.train:
            steps = {}
            for dropout in (0.1, 0.0):
                model = seeded_bert.build(train, dtype, hidden_dropout=dropout, attention_dropout=0.1)
                inputs = seeded_bert.batch(LENGTHS)
                steps[str(dropout)] = functools.partial(seeded_bert.step, fastattn.patch(model), inputs)
            excess = ratio(steps, arguments.rounds) - 1
            print(f"{name:9} {train:5} step +{excess:.1%}, fused at best +{excess * (1 - share):.1%}")


def added_pass(dtype: torch.dtype, rounds: int) -> float:
    """The share that adding the residual has of dropout + residual."""
    dropout = Dropout(0.1).train()
    x = torch.randn(1, sum(LENGTHS), 384, dtype=dtype, requires_grad=True)
    residual, upstream = torch.randn_like(x.detach()), torch.randn_like(x.detach())

    def repeated(function: Callable) -> Callable:
        return lambda: [torch.autograd.grad(function(), x, upstream) for _ in range(20)]

    steps = {"alone": repeated(lambda: dropout(x)), "both": repeated(lambda: dropout(x) + residual)}
    return 1 - ratio(steps, 3 * rounds)


def ratio(steps: dict[str, Callable], rounds: int) -> float:
    """The median of the rounds' ratios of CPU time, the first step's to the second's."""
    first, second = seeded_bert.interleaved(steps, rounds).values()
    return statistics.median(a / b for (_, a), (_, b) in zip(first, second, strict=True))


if __name__ == "__main__":
    main()
