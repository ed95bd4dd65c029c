"""What one sees while it runs: a bar with loss, tokens/s and time left, or lines without a terminal."""

from __future__ import annotations

import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["Bar", "console"]

console = Console(highlight=False, soft_wrap=True)
LINES = 8  # that a bar leaves behind where output is not a terminal


class Bar:
    """A count of `total` things, each taking some seconds and tokens. Use as a context manager."""

    def __init__(self, title: str, total: int, start: int = 0):
        self._title, self._total, self._done = title, total, start
        self._recent: deque[tuple[float, int]] = deque(maxlen=20)
        self._began, self._first = time.perf_counter(), start
        self._bar = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
            )
            self._bar = Progress(
                *columns, TextColumn("{task.fields[detail]}"), TimeRemainingColumn(), console=console
            )
            self._task = self._bar.add_task(title, total=total, completed=start, detail="")

    def __enter__(self) -> Bar:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._bar:
            self._bar.stop()

    def advance(
        self, seconds: float = 0.0, tokens: int = 0, loss: float | None = None, detail: str = ""
    ) -> None:
        self._done += 1
        self._recent.append((seconds, tokens))
        spent, read = map(sum, zip(*self._recent, strict=True))
        detail += f"loss {loss:.3f}  " if loss is not None else ""
        detail += f"{read / spent:,.0f} tokens/s" if spent and read else ""
        if self._bar:
            self._bar.update(self._task, completed=self._done, detail=detail)
        elif self._done == self._total or self._done % -(-self._total // LINES) == 0:
            left = (
                (time.perf_counter() - self._began) / (self._done - self._first) * (self._total - self._done)
            )
            console.print(f"{self._title}  {self._done}/{self._total}  {detail}  {left:.0f} s left")
