"""The names of checkpoints: `iteration_00001560`, or `iteration_00001560.1` where that iteration was saved before.

Without torch, so that a command can look for checkpoints before torch loads.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from lbsgd.errors import DataError

CHECKPOINT_NAME = re.compile(r"iteration_\d+(\.\d+)?")


def named(folder: Path) -> list[Path]:
    """Return what bears a checkpoint's name in a folder, oldest first, damaged or not; nothing where no folder is.

    Raises DataError for a folder that cannot be read: a run without checkpoints begins anew.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from None
    return sorted((folder / name for name in names if CHECKPOINT_NAME.fullmatch(name)), key=place)


def place(path: Path) -> tuple[str, int]:
    """Return what checkpoints are sorted by: the iteration, and how often it was saved before."""
    return path.stem, int(path.suffix[1:] or 0)
