"""Reads from the log next to weights what they were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from lbsgd.errors import DataError
from lbsgd.report.log_lines import Record
from lbsgd.report.run_log import read_run
from lbsgd.train.checkpoint_names import CHECKPOINT_NAME


def header_in(folder: Path) -> Record:
    """Return the first line of the log in a run's folder; an empty one if there is no readable log."""
    try:
        return read_run(folder).header
    except DataError:  # weights of another program, or moved ones, can be evaluated all the same
        return {}


def run_of(weights: Path) -> Path:
    """Return the folder of the run that wrote a file with weights: the file's own, or above its checkpoints."""
    folder = weights.absolute().parent
    return folder.parents[1] if CHECKPOINT_NAME.fullmatch(folder.name) else folder


def other_class(
    trained: Sequence[str], here: Sequence[str], first_label: int = 0, there: str = "training"
) -> str | None:
    """Return in words the first label that meant another class in training, or in `there`; None if there is none."""
    for label, (then, now) in enumerate(zip_longest(trained, here, fillvalue="no class"), first_label):
        if then != now:
            return f"label {label} was {then} in {there} and is {now} here"
    return None
