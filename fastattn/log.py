"""What patch does and what it could not do is said once, through logging.getLogger("fastattn")."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger("fastattn")
_said: set[str] = set()


@torch.compiler.disable
def log_once(message: str) -> None:
    """A warning, the first time this process has cause for it."""
    if message not in _said:
        _said.add(message)
        logger.warning(message)
