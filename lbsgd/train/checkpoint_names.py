"""The names of checkpoints: `iteration_00001560`, or `iteration_00001560.1` where that iteration was saved before.

Without torch, so that a command can look for checkpoints before torch loads.
"""

from __future__ import annotations

import re
from pathlib import Path

from lbsgd.disk import is_there

CHECKPOINT_NAME = re.compile(r"iteration_\d+(\.\d+)?")


def named(folder: Path) -> list[Path]:
    """Return what bears a checkpoint's name in a folder, oldest first, damaged or not."""
    found = folder.glob("iteration_*") if is_there(folder) else ()
    return sorted((path for path in found if CHECKPOINT_NAME.fullmatch(path.name)), key=place)


def place(path: Path) -> tuple[str, int]:
    """Return what checkpoints are sorted by: the iteration, and how often it was saved before."""
    return path.stem, int(path.suffix[1:] or 0)
