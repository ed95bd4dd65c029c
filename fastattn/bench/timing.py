"""Medians that are fair: contenders take turns, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["interleaved_medians"]

FEWEST_ROUNDS, MOST_ROUNDS = 3, 50


def interleaved_medians(
    steps: Mapping[str, Callable[[], None]], seconds: float, synchronize: Callable[[], None] | None = None
) -> dict[str, float]:
    """The median seconds of each step over rounds in which each runs once (fast ones several times in a row).

    seconds: about how long all rounds take together; at least three rounds are made.
    """
    wait = synchronize or (torch.cuda.synchronize if torch.cuda.is_available() else lambda: None)
    repeats = {}
    for name, step in steps.items():
        step()  # warm-up: workspaces, thread pools, compilation
        once = _time(step, 1, wait)
        repeats[name] = max(1, min(100, int(2e-3 / max(once, 1e-7))))  # at least 2 ms on the clock
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name, step in steps.items():
            times[name].append(_time(step, repeats[name], wait))
    return {name: statistics.median(measured) for name, measured in times.items()}


def _time(step: Callable[[], None], repeats: int, wait: Callable[[], None]) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    wait()
    return (time.perf_counter() - start) / repeats
