"""What the bench adds on a GPU: its roof, and the peers that exist only there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .contenders import Refusal
from .grid import Inputs
from .peak import Peak

__all__ = ["device_of", "flash_attn", "machine", "measure_peak", "sdpa_by"]


def device_of(backend: str) -> str:
    """Where the bench puts its tensors: on the GPU if the backend is for one and torch sees one."""
    return "cuda" if backend not in ("cpu", "reference") and torch.cuda.is_available() else "cpu"


def machine() -> dict:
    """The GPU and what drives it."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "capability": getattr(properties, "gcnArchName", f"{properties.major}.{properties.minor}"),
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
        "triton": importlib.metadata.version("triton")
        if importlib.util.find_spec("triton")
        else "not installed",
    }


def measure_peak(device: str, size: int = 8192, seconds: float = 1.0) -> Peak:
    """The rates of torch's own matrix product and copy: no data sheet's, but what this machine reaches."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    rates = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(size, size, device=device).to(dtype)
        rates[dtype] = 2 * size**3 / _best(lambda x=x: x @ x, device, seconds)
    source = torch.zeros(size, size, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _best(lambda: target.copy_(source), device, seconds)
    half = (rates[torch.bfloat16], rates[torch.float16])
    return Peak(name, torch.get_num_threads(), rates[torch.float32], half[0], copied, float16=half[1])


def _best(step: Callable[[], object], device: str, seconds: float) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    step()
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        wait()
        start = time.perf_counter()
        step()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


def sdpa_by(backend: SDPBackend, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """torch's attention by one of its kernels, refusing where torch would."""
    mask = None if inputs.key_mask is None else inputs.key_mask[:, None, None, :]

    def run() -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                inputs.q, inputs.k, inputs.v, attn_mask=mask, is_causal=inputs.cell.mask == "causal"
            )

    return _tried(run)


def flash_attn(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """The package flash-attn, whose tensors are (B, N, H, D)."""
    if importlib.util.find_spec("flash_attn") is None:
        raise Refusal("flash-attn is not installed")
    from flash_attn import flash_attn_func

    if inputs.key_mask is not None:
        raise Refusal("takes no key mask")
    causal = inputs.cell.mask == "causal"
    return _tried(
        lambda: flash_attn_func(
            inputs.q.transpose(1, 2), inputs.k.transpose(1, 2), inputs.v.transpose(1, 2), causal=causal
        ).transpose(1, 2)
    )


def _tried(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """run, if it runs once."""
    try:
        run()
    except RuntimeError as error:
        raise Refusal(str(error).strip().splitlines()[0]) from None
    return run
