"""Rotary positions in a patched Llama: their share of a step and of a prompt's pass, old and new.

    python benchmarks/bench_rotary.py [--sizes 384/6/6/6] [--lengths 128 512 2048] [--dtypes bfloat16]

Each line is the share of the process's CPU time that turning q and k takes, by transformers' own function and
by fastattn.rotary: the median, over interleaved rounds, of 1 - (time without turning) / (time with). "ratio"
is transformers' time over ours, of the whole. Adapters are LoRA's, r = 8 on q and v of a frozen backbone. A
size is width/layers/heads/kv heads. Without --recompute, the arms differ in nothing else.

--bytes prints instead what a step saves for backward, by fastattn.hf.explain, for each `recompute`.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable

import peft
import torch
import transformers
from seeded_bert import interleaved, step
from torch import nn
from transformers.models.llama import modeling_llama

import fastattn
from fastattn.hf.rotary import restore_rotary

ARMS = ("transformers", "fastattn", "none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["384/6/6/6", "512/8/8/4"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--tokens", type=int, default=2048, help="of a batch")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--bytes", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    print(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, threads {arguments.threads}"
    )
    for size in arguments.sizes:
        for dtype in arguments.dtypes:
            for length in arguments.lengths:
                samples = max(1, arguments.tokens // length)
                inputs = batch(samples, length)
                print(f"{size} {dtype}, {samples} x {length}:", end=" ", flush=True)
                if arguments.bytes:
                    print(saved(size, getattr(torch, dtype), inputs), flush=True)
                    continue
                models = {arm: build(size, getattr(torch, dtype), arguments.recompute) for arm in ARMS}
                of_transformers(models["transformers"]), of_transformers(models["none"])
                for name, run in (("training", step), ("prompt", prompt)):
                    for model in models.values():
                        model.train(name == "training")
                    found = shares(models, functools.partial(run, inputs=inputs), arguments.rounds)
                    print(f"{name} {found}", end="; ", flush=True)
                print(flush=True)


def build(size: str, dtype: torch.dtype, recompute: str) -> nn.Module:
    hidden, layers, heads, kv_heads = map(int, size.split("/"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    adapters = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return fastattn.patch(peft.get_peft_model(model, adapters), recompute=recompute)


def batch(samples: int, length: int) -> dict:
    ids = torch.randint(0, 1000, (samples, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


@torch.no_grad()
def prompt(model: nn.Module, inputs: dict) -> None:
    model(input_ids=inputs["input_ids"], logits_to_keep=1)


def of_transformers(model: nn.Module) -> nn.Module:
    restore_rotary(model)
    return model


def shares(models: dict[str, nn.Module], run: Callable[[nn.Module], None], rounds: int) -> str:
    own = modeling_llama.apply_rotary_pos_emb

    def of(arm: str) -> None:
        modeling_llama.apply_rotary_pos_emb = (lambda q, k, cos, sin: (q, k)) if arm == "none" else own
        run(models[arm])

    found = interleaved({arm: functools.partial(of, arm) for arm in models}, rounds)
    modeling_llama.apply_rotary_pos_emb = own
    times = {arm: [cpu for _, cpu in measured] for arm, measured in found.items()}
    of_theirs, of_ours, ratio = (
        statistics.median(map(f, times["transformers"], times["fastattn"], times["none"]))
        for f in (lambda a, b, c: 1 - c / a, lambda a, b, c: 1 - c / b, lambda a, b, c: a / b)
    )
    return f"{of_theirs:.1%} -> {of_ours:.1%}, ratio {ratio:.3f}"


def saved(size: str, dtype: torch.dtype, inputs: dict) -> str:
    found = []
    for recompute in ("none", "auto", "all"):
        ours = fastattn.hf.explain(build(size, dtype, recompute), inputs).saved_bytes
        theirs = fastattn.hf.explain(of_transformers(build(size, dtype, recompute)), inputs).saved_bytes
        found.append(f"{recompute} {theirs / 2**20:.1f} -> {ours / 2**20:.1f} MiB")
    return ", ".join(found)


if __name__ == "__main__":
    main()
