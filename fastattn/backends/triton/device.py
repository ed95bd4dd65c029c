"""Where kernels go."""

from __future__ import annotations

import contextlib

import torch


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Kernels go to the current device: make it this one. A CPU is where the interpreter runs them."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()  # which costs less
    return torch.cuda.device(device)
