"""A T5 encoder on long texts, patched against transformers' own: forward and backward, interleaved medians.

    python benchmarks/bench_t5.py [--tokens 2048] [--dtype bfloat16]

The model is seeded, in the shape of T5-small (6 layers of 8 heads of 64), with LoRA on q and v. It is trained
in two ways: with the table of relative position biases, which every layer adds to its logits, and with that
table frozen. Contenders are transformers' eager and sdpa, and a patched
model with recompute="auto" and "none".

Memory is what autograd begins to hold while attention modules run; and, for the whole model, how much more
the process has resident at the peak of a step than before it.
"""

from __future__ import annotations

import argparse
import warnings

import peft
import torch
import transformers
from torch import nn
from transformers.models.t5.modeling_t5 import T5Attention

import fastattn
from fastattn.bench.timing import interleaved_medians
from fastattn.finetune.measure import SavedBytes, machine, peak_rss, reset_peak_rss, rss

OURS = ("auto", "none")  # fastattn.patch(model, recompute=...)
CONTENDERS = ("eager", "sdpa", *OURS)
TABLE = "relative_attention_bias"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--texts", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=60, help="about how long to measure each line")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(", ".join(f"{name} {value}" for name, value in machine().items()), f"torch {torch.__version__}")
    for trains_table in (True, False):
        measure(trains_table, arguments)


def measure(trains_table: bool, arguments: argparse.Namespace) -> None:
    models = {name: build(name, trains_table, getattr(torch, arguments.dtype)) for name in CONTENDERS}
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 1000, (arguments.texts, arguments.tokens), generator=generator)

    direction = torch.randn(arguments.texts, arguments.tokens, 512, generator=generator)

    def step(model: nn.Module) -> None:
        model.zero_grad()
        (model(input_ids=ids).last_hidden_state.float() * direction).mean().backward()

    saved, peaks = {}, {}
    for name, model in models.items():
        step(model)
        saved[name] = attention_bytes(model, ids)
        reset_peak_rss()
        before = rss() or 0
        step(model)
        peaks[name] = peak_rss() - before
    seconds = interleaved_medians(
        {name: lambda model=model: step(model) for name, model in models.items()}, arguments.seconds
    )
    gradients = {name: gradient(model) for name, model in models.items()}
    way = "trained" if trains_table else "frozen"
    print(f"\n{arguments.texts} x {arguments.tokens} tokens, {arguments.dtype}, table {way}")
    for name in CONTENDERS:
        error = (gradients[name] - gradients["eager"]).norm() / gradients["eager"].norm()
        print(
            f"  {name:6} {seconds[name]:7.3f} s, {seconds['sdpa'] / seconds[name]:5.2f} times sdpa's speed; "
            f"attention saved {saved[name] / 2**20:6,.1f} MiB ({saved[name] / saved['sdpa']:.3f}), "
            f"peak {peaks[name] / 2**20:6,.0f} MiB ({peaks[name] / peaks['sdpa']:.2f}); "
            f"gradients off eager's by {error:.1e}",
            flush=True,
        )


def build(contender: str, trains_table: bool, dtype: torch.dtype) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=1000, d_model=512, d_kv=64, num_heads=8, d_ff=2048, num_layers=6, dropout_rate=0.0
    )
    config._attn_implementation = "sdpa" if contender in OURS else contender
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(config).to(dtype)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q", "v"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)  # zeros, as peft has them, would leave lora_A no gradient
        if TABLE in name:
            parameter.requires_grad_(trains_table)
    if contender in OURS:
        fastattn.patch(model, recompute=contender)
    return model.train()


def attention_bytes(model: nn.Module, ids: torch.Tensor) -> int:
    """What autograd begins to hold, by unique storage, while an attention module runs."""
    counter = SavedBytes(model.state_dict().values())
    counter.counts = False

    def mark(now: bool) -> None:
        counter.counts = now

    handles = []
    for module in model.modules():
        if isinstance(module, T5Attention):
            handles.append(module.register_forward_pre_hook(lambda *_: mark(True)))
            handles.append(module.register_forward_hook(lambda *_: mark(False)))
    with counter.counting():
        held = model(input_ids=ids)  # what is saved lives while this does
    for handle in handles:
        handle.remove()
    del held
    return counter.bytes


def gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
