"""What a frozen linear layer can gain on this CPU, against F.linear: interleaved medians, as ratios.

    python benchmarks/bench_frozen_linear.py [--tokens 512 3500] [--threads 1 2] [--parts forward gelu ...]

Every figure is how many times as fast as the part's first contender, by the clock and (in brackets) by the
process's CPU time, which other processes disturb less; with several threads it counts those that wait, too.

    forward    x·W + b: bias fused by oneDNN on the weight as it is; the same on a prepacked copy of it (which
               oneDNN lays out for so many tokens); the transposed weight kept; without a bias
    gelu       GELU behind it: as a module, or in oneDNN's epilogue
    residual   x·W + b + r: as an addition, or in oneDNN's epilogue
    qkv        three layers on the same x, apart and as one product
    dx         the gradient with respect to x, with W as it is and a prepacked transposed copy
    autocast   fp32 weights under bf16 autocast, which casts them in every call, and with bf16 copies kept
    lora       fp32 adapters on q and v, as peft computes them; in x's dtype, added by the last product; both
               A in one product

bench_frozen_step.py has what whole training steps gain.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

fused = torch.ops.mkldnn._linear_pointwise
Steps = dict[str, Callable[[], object]]


def prepacked(weight: Tensor, tokens: int) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 7000])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--hidden", type=int, default=384, help="384: MiniLM; 768: BERT-base")
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for dtype in (getattr(torch, name) for name in arguments.dtypes):
            for tokens in arguments.tokens:
                print(f"\n{threads} thread(s), {str(dtype).removeprefix('torch.')}, {tokens} tokens")
                for part in arguments.parts:
                    n = arguments.hidden
                    for shape in ((n, n), (n, 3 * n), (n, 4 * n), (4 * n, n)):
                        torch.manual_seed(0)
                        steps = PARTS[part](tokens, *shape, dtype)
                        if steps:
                            show(f"{part} {shape[0]}→{shape[1]}", measure(steps, arguments.rounds))


def show(title: str, medians: dict[str, tuple[float, float]]) -> None:
    (first, (clock, cpu)), *others = medians.items()
    ratios = "  ".join(f"{name} {clock / c:.2f} ({cpu / p:.2f})" for name, (c, p) in others)
    print(f"  {title:20} {first} {clock * 1e6:.0f} us: {ratios}", flush=True)


def measure(steps: Steps, rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds of one call, by the clock and of the process's CPU time; contenders take turns."""
    repeats = {}
    for name, step in steps.items():
        step()
        repeats[name] = max(1, min(100, round(2e-3 / max(1e-6, timed(step, 1)[0]))))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(timed(step, repeats[name]))
    return {
        name: tuple(statistics.median(kind) for kind in zip(*measured, strict=True))
        for name, measured in times.items()
    }


def timed(step: Callable[[], object], repeats: int) -> tuple[float, float]:
    clock, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - clock) / repeats, (time.process_time() - cpu) / repeats


def operands(tokens: int, fan_in: int, fan_out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(fan_out, fan_in) * fan_in**-0.5
    return torch.randn(tokens, fan_in).to(dtype), weight.to(dtype), torch.randn(fan_out).to(dtype)


def forward(tokens: int, fan_in: int, fan_out: int, dtype: torch.dtype) -> Steps:
    x, w, b = operands(tokens, fan_in, fan_out, dtype)
    packed, transposed = prepacked(w, tokens), w.t().contiguous()
    return {
        "F.linear": lambda: F.linear(x, w, b),
        "fused bias": lambda: fused(x, w, b, "none", [], ""),
        "prepacked": lambda: fused(x, packed, b, "none", [], ""),
        "transposed": lambda: torch.addmm(b, x, transposed),
        "no bias": lambda: F.linear(x, w),
    }


def gelu(tokens: int, fan_in: int, fan_out: int, dtype: torch.dtype) -> Steps:
    if fan_out != 4 * fan_in:
        return {}
    x, w, b = operands(tokens, fan_in, fan_out, dtype)
    packed = prepacked(w, tokens)
    return {
        "F.linear, F.gelu": lambda: F.gelu(F.linear(x, w, b)),
        "fused bias, F.gelu": lambda: F.gelu(fused(x, w, b, "none", [], "")),
        "fused both": lambda: fused(x, w, b, "gelu", [], "none"),
        "prepacked, fused both": lambda: fused(x, packed, b, "gelu", [], "none"),
    }


def residual(tokens: int, fan_in: int, fan_out: int, dtype: torch.dtype) -> Steps:
    if fan_out > fan_in:
        return {}
    x, w, b = operands(tokens, fan_in, fan_out, dtype)
    r = torch.randn(tokens, fan_out).to(dtype)
    return {
        "F.linear + r": lambda: F.linear(x, w, b) + r,
        "fused bias, + r": lambda: fused(x, w, b, "none", [], "") + r,
        "fused both": lambda: torch.ops.mkldnn._linear_pointwise.binary(x, r, w, b, "add"),
    }


def qkv(tokens: int, fan_in: int, fan_out: int, dtype: torch.dtype) -> Steps:
    if fan_out != 3 * fan_in:
        return {}
    x, w, b = operands(tokens, fan_in, fan_out, dtype)
    apart = [(wi.clone(), bi.clone()) for wi, bi in zip(w.chunk(3), b.chunk(3), strict=True)]
    packed, packed_apart = prepacked(w, tokens), [(prepacked(wi, tokens), bi) for wi, bi in apart]
    return {
        "3 F.linear": lambda: [F.linear(x, wi, bi) for wi, bi in apart],
        "1 F.linear": lambda: F.linear(x, w, b),
        "3 fused bias": lambda: [fused(x, wi, bi, "none", [], "") for wi, bi in apart],
        "1 fused bias": lambda: fused(x, w, b, "none", [], ""),
        "3 prepacked": lambda: [fused(x, wi, bi, "none", [], "") for wi, bi in packed_apart],
        "1 prepacked": lambda: fused(x, packed, b, "none", [], ""),
    }


def dx(tokens: int, fan_in: int, fan_out: int, dtype: torch.dtype) -> Steps:
    _, w, _ = operands(tokens, fan_in, fan_out, dtype)
    g = torch.randn(tokens, fan_out).to(dtype)
    packed = prepacked(w.t().contiguous(), tokens)
    return {"g @ W": lambda: g @ w, "prepacked": lambda: fused(g, packed, None, "none", [], "")}


def autocast(tokens: int, fan_in: int, fan_out: int, dtype: torch.dtype) -> Steps:
    if dtype != torch.float32:
        return {}
    x, w, b = operands(tokens, fan_in, fan_out, dtype)
    half, half_b = w.bfloat16(), b.bfloat16()
    packed = prepacked(half, tokens)

    def plain() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(x, w, b)

    return {
        "F.linear": plain,
        "fused bias": lambda: fused(x.bfloat16(), w.bfloat16(), b.bfloat16(), "none", [], ""),
        "kept, F.linear": lambda: F.linear(x.bfloat16(), half, half_b),
        "kept, fused bias": lambda: fused(x.bfloat16(), half, half_b, "none", [], ""),
        "kept, prepacked": lambda: fused(x.bfloat16(), packed, half_b, "none", [], ""),
    }


def lora(tokens: int, fan_in: int, fan_out: int, dtype: torch.dtype) -> Steps:
    if fan_in != fan_out:
        return {}
    x, w, b = operands(tokens, fan_in, fan_out, dtype)
    adapters = [(torch.randn(8, fan_in), torch.randn(fan_out, 8)) for _ in range(2)]

    def passes() -> list[Tensor]:
        return [
            (F.linear(x, w, b) + F.linear(F.linear(x.float(), down), up) * 2).to(dtype)
            for down, up in adapters
        ]

    def products() -> list[Tensor]:
        return [add(x @ down.to(dtype).t(), up) for down, up in adapters]

    def together() -> list[Tensor]:
        low = x @ torch.cat([down for down, _ in adapters]).to(dtype).t()
        return [add(part, up) for part, (_, up) in zip(low.chunk(2, 1), adapters, strict=True)]

    def add(low: Tensor, up: Tensor) -> Tensor:
        return F.linear(x, w, b).addmm_(low, (2 * up).to(dtype).t())

    return {"peft": passes, "added": products, "both A": together}


PARTS = {f.__name__: f for f in (forward, gelu, residual, qkv, dx, autocast, lora)}


if __name__ == "__main__":
    main()
