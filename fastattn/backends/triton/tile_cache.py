"""Which tiles were found fastest, kept on disk: one JSON file for each GPU model and release of Triton.

What the file says is believed only as far as a reader can check it (autotune.py takes no tiles that it would
not have tried itself), and a file that can't be read or written costs a line in the log and nothing else.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import astuple
from pathlib import Path

from ...log import log_once
from .configs import TileConfig

_FORMAT = 1
_LARGEST_FILE = 1 << 22  # bytes; a thousand problem classes take a tenth of it


def folder() -> Path:
    """$XDG_CACHE_HOME/fastattn, by default ~/.cache/fastattn."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "fastattn"


class TileCache:
    """Tiles by problem class, for one GPU model under one release of Triton. Reads its file once."""

    def __init__(self, gpu: str, triton_version: str):
        self._head = {"format": _FORMAT, "gpu": gpu, "triton": triton_version}
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", f"{gpu}-triton-{triton_version}")
        self.path = folder() / "triton-tiles" / f"{slug}.json"
        self._tiles = self._read()

    def get(self, problem_class: str) -> TileConfig | None:
        return self._tiles.get(problem_class)

    def put(self, problem_class: str, tiles: TileConfig) -> None:
        """Remember, also on disk, together with what other processes wrote there since."""
        self._tiles = self._read() | self._tiles | {problem_class: tiles}
        rows = {key: [int(x) for x in astuple(tiles)] for key, tiles in sorted(self._tiles.items())}
        temporary = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Readers see the old file or the new one, never half of one.
            with tempfile.NamedTemporaryFile(
                "w", dir=self.path.parent, prefix=self.path.name, suffix=".tmp", delete=False
            ) as file:
                temporary = file.name
                json.dump(self._head | {"tiles": rows}, file, indent=1)
            Path(temporary).replace(self.path)
        except OSError as error:
            log_once(f"triton: tiles that were tuned can't be kept in {self.path}: {error}")
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)

    def _read(self) -> dict[str, TileConfig]:
        try:
            with self.path.open("rb") as file:
                text = file.read(_LARGEST_FILE + 1)
            if len(text) > _LARGEST_FILE:
                raise ValueError(f"larger than {_LARGEST_FILE} bytes")
            return self._parse(json.loads(text))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            log_once(f"triton: ignoring the tuned tiles in {self.path}: {error}")
            return {}

    def _parse(self, content: object) -> dict[str, TileConfig]:
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        for name, wanted in self._head.items():
            if content.get(name) != wanted:
                raise ValueError(f"{name} is {content.get(name)!r}, not {wanted!r}")
        rows = content.get("tiles")
        if not isinstance(rows, dict):
            raise ValueError("tiles is no JSON object")
        for key, row in rows.items():
            if not (isinstance(row, list) and len(row) == 5 and all(type(x) is int for x in row)):
                raise ValueError(f"tiles of {key!r} are no five integers")
        return {key: TileConfig(*row[:4], paired=bool(row[4])) for key, row in rows.items()}
