"""In-context learning behind one prompt: a shared prompt against transformers' ways, interleaved medians.

    python benchmarks/bench_icl.py [--dtype bfloat16] [--threads 1] ...

The task is to score the token behind each of --queries queries of --tokens tokens, all behind the same prompt
of --prompt tokens. Contenders, sdpa attention in both of transformers':

    repeated   the prompt in front of every query, computed anew
    expanded   the prompt's past_key_values, computed once beforehand, expanded to the batch
    shared     fastattn.hf.SharedPrompt, computed once beforehand
"""

from __future__ import annotations

import argparse

import torch
import transformers
from transformers import DynamicCache

import fastattn
from fastattn.bench.timing import interleaved_medians
from fastattn.hf import SharedPrompt, patch

LABELS = (11, 12, 13, 14)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens")
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32, help="of each query")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--kv-heads", type=int, default=6, help="of 64; query heads are hidden / 64")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=60, help="about how long to measure")
    parser.add_argument("--without-repeated", action="store_true", help="leave the slowest contender out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    dtype = getattr(torch, arguments.dtype)
    plain, patched = (build(arguments, dtype) for _ in range(2))
    patch(patched)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(5, 32000, (1, arguments.prompt), generator=generator)
    queries = torch.randint(5, 32000, (arguments.queries, arguments.tokens), generator=generator)
    concatenated = torch.cat((prompt.expand(len(queries), -1), queries), dim=1)
    labels = torch.tensor(LABELS)
    with torch.no_grad():
        prefix = plain(prompt, use_cache=True, logits_to_keep=1).past_key_values
        shared = SharedPrompt(patched, prompt)

        def scores(out) -> torch.Tensor:
            return out.logits[:, -1].float().log_softmax(-1)[:, labels]

        def repeated() -> torch.Tensor:
            return scores(plain(concatenated, use_cache=False, logits_to_keep=1))

        def expanded_cache() -> DynamicCache:
            size = len(queries)
            pairs = ((layer.keys, layer.values) for layer in prefix.layers)
            return DynamicCache([tuple(t.expand(size, -1, -1, -1) for t in pair) for pair in pairs])

        def expanded(cache: DynamicCache | None = None) -> torch.Tensor:
            cache = expanded_cache() if cache is None else cache
            return scores(plain(queries, past_key_values=cache, use_cache=True, logits_to_keep=1))

        def ours() -> torch.Tensor:
            return shared.classify(queries, [[label] for label in LABELS])

        steps = {"repeated": repeated, "expanded": expanded, "shared": ours}
        if arguments.without_repeated:
            del steps["repeated"]
        reference = steps[next(iter(steps))]()
        cache = expanded_cache()
        expanded(cache)
        seconds = interleaved_medians(steps, arguments.seconds)
        held = {
            "expanded": sum(t.untyped_storage().nbytes() for x in cache.layers for t in (x.keys, x.values)),
            "shared": shared.nbytes,
        }
        tokens = queries.numel()
        kernels = fastattn.dispatch.load("cpu")
        print(
            f"{arguments.layers} layers x {arguments.hidden}, {arguments.dtype}, "
            f"{arguments.threads} threads, "
            f"kernels {kernels if isinstance(kernels, str) else kernels.isa()}: {len(queries)} queries of "
            f"{arguments.tokens} tokens behind a prompt of {arguments.prompt}"
        )
        for name, step in steps.items():
            difference = (step() - reference).abs().max().item()
            memory = f", keys and values held {held[name] / 2**20:,.1f} MiB" if name in held else ""
            print(
                f"{name:9} {seconds[name]:8.3f} s a batch, {tokens / seconds[name]:7,.0f} query tokens/s, "
                f"shared is {seconds[name] / seconds['shared']:5.2f} times as fast{memory}, "
                f"largest difference from {next(iter(steps))} {difference:.1e}"
            )


def build(arguments: argparse.Namespace, dtype: torch.dtype) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 8 // 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=max(2048, arguments.prompt + arguments.tokens),
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.to(dtype).eval().requires_grad_(False)


if __name__ == "__main__":
    main()
