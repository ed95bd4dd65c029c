"""Builds happen in copies of the source tree, in a folder with a space in its name."""

from __future__ import annotations

from pathlib import Path

import pytest
from building import copy_sources, stub_kernels


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """The whole project, nothing compiled."""
    return copy_sources(tmp_path / "a project")


@pytest.fixture
def stub_tree(source_tree: Path) -> Path:
    """The whole project, except that csrc/ builds a library of one function."""
    stub_kernels(source_tree)
    return source_tree
