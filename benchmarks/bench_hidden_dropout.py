"""What a patched BERT's hidden-state dropout costs a training step, and what fusing it could save at most.

    python benchmarks/bench_hidden_dropout.py [--train lora head] [--dtypes float32] [--rounds 12]

"step" is a step with hidden dropout 0.1 over one without, attention's dropout in both; "fused" what would be
left of that excess if dropout + residual took no longer than dropout alone, forward and backward. Medians of
interleaved rounds, CPU time of the process, MiniLM's size (6 x 384/1536), LoRA r = 8 on query and value.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import peft
import torch
import transformers
from torch import nn

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
            models = [model(train, dtype, dropout) for dropout in (0.1, 0.0)]
            times = interleaved([lambda m=m: step(m) for m in models], arguments.rounds)
            excess = statistics.median(a / b for a, b in times) - 1
            print(f"{name:9} {train:5} step +{excess:.1%}, fused at best +{excess * (1 - share):.1%}")


def model(train: str, dtype: torch.dtype, hidden_dropout: float) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=3000,
        hidden_size=384,
        num_attention_heads=12,
        intermediate_size=1536,
        num_hidden_layers=6,
        hidden_dropout_prob=hidden_dropout,
        attention_probs_dropout_prob=0.1,
    )
    bert = transformers.BertForSequenceClassification(config).to(dtype)
    if train == "lora":
        adapters = peft.LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS")
        bert = peft.get_peft_model(bert, adapters)
    else:
        bert.bert.requires_grad_(False)
    return fastattn.patch(bert.train())


def step(bert: nn.Module) -> None:
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    bert(input_ids=mask * 7, attention_mask=mask, labels=torch.zeros(len(LENGTHS)).long()).loss.backward()


def added_pass(dtype: torch.dtype, rounds: int) -> float:
    """The share that adding the residual has of dropout + residual."""
    dropout = Dropout(0.1).train()
    x = torch.randn(1, sum(LENGTHS), 384, dtype=dtype, requires_grad=True)
    residual, upstream = torch.randn_like(x.detach()), torch.randn_like(x.detach())

    def repeated(function: Callable) -> Callable:
        return lambda: [torch.autograd.grad(function(), x, upstream) for _ in range(20)]

    times = interleaved([repeated(lambda: dropout(x) + residual), repeated(lambda: dropout(x))], 3 * rounds)
    return statistics.median(1 - alone / both for both, alone in times)


def interleaved(functions: list[Callable], rounds: int) -> list[list[float]]:
    for function in functions:
        function()
        function()
    times = []
    for i in range(rounds):
        times.append([0.0] * len(functions))
        for k in range(len(functions)) if i % 2 else reversed(range(len(functions))):
            start = time.process_time()
            functions[k]()
            times[-1][k] = time.process_time() - start
    return times


if __name__ == "__main__":
    main()
