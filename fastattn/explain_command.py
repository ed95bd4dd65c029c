"""`fastattn explain`: which kernel a problem of given shapes would get, and what it would cost."""

from __future__ import annotations

import argparse

from .errors import InvalidArgumentError

__all__ = ["add_arguments", "run"]

_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shape", metavar="B,H,N,D", help="batch, query heads, queries and head_dim: 8,12,512,64"
    )
    parser.add_argument("--seqlen-k", type=int, metavar="N", help="keys (as many as queries)")
    parser.add_argument("--kv-heads", type=int, metavar="H", help="heads of k and v (as many as of q)")
    parser.add_argument("--head-dim-v", type=int, metavar="D", help="of v (that of q and k)")
    parser.add_argument("--dtype", default="float32", choices=_DTYPES, help="(float32)")
    parser.add_argument("--causal", action="store_true", help="query i sees keys j <= i + Nk - Nq")
    parser.add_argument("--key-mask", action="store_true", help="with a mask of keys, as padded batches have")
    parser.add_argument("--dropout-p", type=float, default=0.0, metavar="P", help="of attention weights (0)")
    parser.add_argument(
        "--gradients", nargs="*", default=["q", "k", "v"], choices=("q", "k", "v"), help="wanted (q k v)"
    )
    parser.add_argument("--backend", default="auto", help="cpu, cuda, triton or reference (auto)")
    parser.add_argument("--device", default="cpu", help="where the tensors are (cpu)")


def run(arguments: argparse.Namespace, argv: list[str]) -> int:
    import torch

    import fastattn

    batch, heads, seqlen_q, head_dim = _shape(arguments.shape)
    seqlen_k = _or(arguments.seqlen_k, seqlen_q)
    kv_heads = _or(arguments.kv_heads, heads)
    head_dim_v = _or(arguments.head_dim_v, head_dim)
    shapes = {
        "q": (batch, heads, seqlen_q, head_dim),
        "k": (batch, kv_heads, seqlen_k, head_dim),
        "v": (batch, kv_heads, seqlen_k, head_dim_v),
    }
    if min(map(min, shapes.values())) < 0:
        raise InvalidArgumentError("shape", shapes, "numbers of 0 or more")
    try:
        device = torch.device(arguments.device)
        q, k, v = (
            torch.empty(
                shape,
                dtype=getattr(torch, arguments.dtype),
                device=device,
                requires_grad=name in arguments.gradients,
            )
            for name, shape in shapes.items()
        )
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise InvalidArgumentError(
            "--device", arguments.device, f"one that torch can use ({error})"
        ) from error
    key_mask = torch.ones(batch, seqlen_k, dtype=torch.bool, device=device) if arguments.key_mask else None
    print(
        fastattn.explain(
            q, k, v,
            causal=arguments.causal, key_mask=key_mask,
            dropout_p=arguments.dropout_p, backend=arguments.backend,
        )
    )  # fmt: skip
    return 0


def _shape(text: str) -> list[int]:
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.isdecimal() for number in numbers):
        raise InvalidArgumentError("shape", text, "batch,heads,queries,head_dim, such as 8,12,512,64")
    return [int(number) for number in numbers]


def _or(value: int | None, default: int) -> int:
    return default if value is None else value
