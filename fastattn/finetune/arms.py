"""A Trainer in this process or behind a pipe, called alike.

In a comparison every arm has a process of its own, so that its memory is its own, and the parent lets them
step in turn, so that a noisy machine is equally noisy for all. Requests and replies are lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from fastattn.errors import FastattnError
from fastattn.finetune.errors import UserInputError

__all__ = ["ArmError", "LocalArm", "RemoteArm"]


class ArmError(RuntimeError):
    """An arm's process failed in a way that is nobody's input."""


class RemoteTraceback(Exception):
    """Where in the other process an error arose: the cause of the error raised here, for --debug."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class LocalArm:
    """A Trainer in this process."""

    def __init__(self, **arguments):
        from fastattn.finetune.training import Trainer

        self.notes: list[str] = []
        with _collecting(self.notes):
            self._trainer = Trainer(**arguments)

    def call(self, method: str, **arguments):
        with _collecting(self.notes):
            return getattr(self._trainer, method)(**arguments)

    def close(self) -> None:
        self._trainer = None


class RemoteArm:
    """A Trainer in a process of its own. What its libraries print goes to `log`."""

    def __init__(self, log: Path, **arguments):
        self.notes: list[str] = []
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fastattn.finetune.arms"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        self.send("__init__", **arguments)

    def send(self, method: str, **arguments) -> None:
        """Starts a call; `receive` waits for its result."""
        try:
            self._process.stdin.write(json.dumps({"method": method, "arguments": arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._died() from error

    def receive(self):
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        reply = json.loads(line)
        self.notes.extend(note for note in reply["notes"] if note not in self.notes)
        if "error" in reply:
            error = (UserInputError if reply["expected"] else ArmError)(reply["error"])
            raise error from RemoteTraceback(reply["traceback"])
        return reply["result"]

    def call(self, method: str, **arguments):
        self.send(method, **arguments)
        return self.receive()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.stdin.close()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process.stdout.close()

    def _died(self) -> ArmError:
        code = self._process.wait()
        lines = self._log.read_text("utf-8", "replace").strip().splitlines()
        return ArmError(
            f"a training process ended with code {code}: {lines[-1] if lines else 'it said nothing'}"
        )


@contextlib.contextmanager
def _collecting(notes: list[str]) -> Iterator[None]:
    """What fastattn logs, such as the reason for a slower path, becomes a note for the report."""

    def note(record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if text not in notes:
            notes.append(text)

    handler = logging.Handler(logging.WARNING)
    handler.emit = note
    logger = logging.getLogger("fastattn")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between libraries, about each other
            yield
    finally:
        logger.removeHandler(handler)


def serve() -> None:
    """The other end of a RemoteArm: one Trainer, driven by the lines of standard input until it closes."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent decides what it means
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # so that nothing a library prints lands among the replies
    arm = None
    for line in sys.stdin:
        request = json.loads(line)
        reply: dict = {}
        try:
            if request["method"] == "__init__":
                arm = LocalArm(**request["arguments"])
                reply["result"] = None
            else:
                reply["result"] = arm.call(request["method"], **request["arguments"])
        except Exception as error:
            expected = isinstance(error, FastattnError)
            reply = {
                "error": str(error) if expected else f"{type(error).__name__}: {error}",
                "expected": expected,
                "traceback": traceback.format_exc(),
            }
        reply["notes"] = arm.notes if arm else []
        replies.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    serve()
