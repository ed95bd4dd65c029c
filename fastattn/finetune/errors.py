"""What a person can put right: the command line prints the sentence and ends with exit code 2."""

from __future__ import annotations

from fastattn.errors import FastattnError

__all__ = ["UserInputError"]


class UserInputError(FastattnError, ValueError):
    """A file, an argument or the disk is not as needed. The message names it in one sentence."""
