"""Opt-in: time a few tiles around the choice of configs.py on the first call for a class of problems.

FASTATTN_TRITON_AUTOTUNE=1 turns it on (launch.py, which imports this only then). The default is off, because
compiling eight variants of a kernel may cost a fine-tuner more than they gain, and because the same call then
rounds the same on every machine of a kind. No kernel here adds to what it finds in its outputs, so the
candidates run on the caller's own tensors.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...log import logger
from .configs import TileConfig
from .prepared import Launch
from .tile_cache import TileCache

_ROUNDS = 10
_GAIN = 0.97  # of the time of configs.py's choice: what is less faster than that is noise


def candidates(config: TileConfig, fixed_rows: bool = False) -> tuple[TileConfig, ...]:
    """config and its neighbours. fixed_rows: keep block_m, which the caller has counted programs by."""
    near = [
        config,
        replace(config, paired=False),
        replace(config, num_stages=config.num_stages + 1),
        replace(config, num_stages=max(config.num_stages - 1, 1)),
        replace(config, num_warps=12 - config.num_warps if config.num_warps in (4, 8) else 4),
        replace(config, block_n=min(config.block_n * 2, 128)),
        replace(config, block_n=max(config.block_n // 2, 16)),
    ]
    if not fixed_rows:
        near.append(replace(config, block_m=min(config.block_m * 2, 128)))
        near.append(replace(config, block_m=max(config.block_m // 2, 16)))
    return tuple(dict.fromkeys(near))


def problem_class(kernel, values: dict[str, object], types: tuple[object, ...], programs: int) -> str:
    """What problems share a choice: the kernel's source and switches, dtypes, and sizes to a power of two."""
    switches = [f"{name}={values[name]}" for name in kernel.arg_names if name.isupper() and name in values]
    sizes = (values["seqlen_q"], values["seqlen_k"], programs)
    rounded = [str(1 << max(size - 1, 0).bit_length()) for size in sizes]
    source = f"{kernel.fn.__name__}-{kernel.cache_key[:12]}"
    return " ".join([source, *map(str, types), "x".join(rounded), *switches])


def device_name() -> str:
    return torch.cuda.get_device_name()


def milliseconds(runs: list[Callable[[], None]]) -> list[float]:
    """The median time of each on the current stream, from rounds of all of them."""
    times: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
    for _ in range(_ROUNDS):
        for run, own in zip(runs, times, strict=True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            own.append((begin, end))
    torch.cuda.synchronize()
    return [statistics.median(begin.elapsed_time(end) for begin, end in own) for own in times]


@functools.cache
def _cache(gpu: str, triton_version: str) -> TileCache:
    return TileCache(gpu, triton_version)


class TunedLaunch:
    """In place of a Launch: one whose tiles are chosen when it is first called."""

    __slots__ = ("_chosen", "_class", "_default", "_make", "_tried", "programs")

    def __init__(
        self, make: Callable[[TileConfig], Launch], tried: tuple[TileConfig, ...], problem_class: str
    ):
        """make: a launch with those tiles. tried: the first is taken unless another one is faster."""
        self._make, self._tried, self._class = make, tried, problem_class
        self._default, self._chosen = make(tried[0]), None
        self.programs = self._default.programs  # none with one tiling means none with any

    def __call__(self, pointers: dict[str, Tensor | None], seed: int | None = None) -> None:
        if self._chosen is None:
            tiles = self._choose(pointers, seed)
            if tiles is None:
                self._default(pointers, seed)
                return
            self._chosen = self._make(tiles)
        self._chosen(pointers, seed)

    def _choose(self, pointers: dict[str, Tensor | None], seed: int | None) -> TileConfig | None:
        """From the cache or by timing; None while a CUDA graph is captured, which would record the timing."""
        import triton

        cache = _cache(device_name(), triton.__version__)
        tiles = cache.get(self._class)
        if tiles in self._tried:
            return tiles
        if torch.cuda.is_current_stream_capturing():
            return None
        tiles = self._fastest(pointers, seed)
        cache.put(self._class, tiles)
        return tiles

    def _fastest(self, pointers: dict[str, Tensor | None], seed: int | None) -> TileConfig:
        from triton.runtime.errors import OutOfResources, PTXASError

        runs = {}
        for tiles in self._tried:
            launch = self._default if tiles == self._tried[0] else self._make(tiles)
            launch.fewer_stages = launch is self._default
            try:
                launch(pointers, seed)  # compiles
            except (OutOfResources, PTXASError):
                if launch is self._default:
                    raise
                continue
            runs[tiles] = functools.partial(launch, pointers, seed)
        times = dict(zip(runs, milliseconds(list(runs.values())), strict=True))
        first, best = self._tried[0], min(times, key=times.__getitem__)
        if times[best] >= _GAIN * times[first]:
            best = first
        logger.info(
            "triton: %s: %s takes %.3f ms, %s %.3f ms", self._class, best, times[best], first, times[first]
        )
        return best


def forget() -> None:
    """Read the files anew: for tests that put something into them."""
    _cache.cache_clear()
