"""The names of checkpoints: `iteration_00001560`, or `iteration_00001560.1` if that iteration was saved before.

This module does not load torch, so that a command can look for checkpoints first.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from lbsgd.errors import CheckpointError

CHECKPOINT_NAME = re.compile(r"iteration_\d+(\.\d+)?")


def named(folder: Path) -> list[Path]:
    """Return a folder's entries with a checkpoint's name, oldest first, damaged or not. Empty without the folder.

    Raises OSError if the folder cannot be read.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted((folder / name for name in names if CHECKPOINT_NAME.fullmatch(name)), key=place)


def named_at_start(folder: Path) -> list[Path]:
    """Return `named`. Raises CheckpointError if the folder cannot be read, because that does not mean it is empty."""
    try:
        return named(folder)
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror}") from None


def place(path: Path) -> tuple[str, int]:
    """Return the key for sorting checkpoints: the iteration, and how often it was saved before."""
    return path.stem, int(path.suffix[1:] or 0)
