"""Checks the images of a grid: its next runs must train on the same images as the finished ones."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from lbsgd.disk import parse_note
from lbsgd.errors import DataError
from lbsgd.experiments.checkout import Checkout, last_line
from lbsgd.experiments.grid import DataSet
from lbsgd.report.lines import warn
from lbsgd.report.run_log import LOG_NAME

# Print what a log's first line has as `data`. The grid's own code runs this, because fingerprints depend on the code.
CLASSIFIER = "from lbsgd.data.folder import open_data; print(open_data(sys.argv[1]).fingerprint)"
DETECTOR = (
    "from lbsgd.data.coco_annotations import read_split as read; train = read(Path(sys.argv[1]), 'train'); "
    "val = read(Path(sys.argv[1]), 'val', training=False); "
    "print(train.fingerprint, len(train), val.fingerprint, len(val))"
)


def require_same_data(data: DataSet, folder: Path, runs: Iterable[Path], checkout: Checkout) -> None:
    """Raise DataError if a run's log, in one of the folders `runs`, names other images than the data folder holds.

    New runs would make rows of other data, which no claim compares. Logs of old versions name no images.
    """
    known = {fingerprint: run for run in runs if (fingerprint := logged_fingerprint(run))}
    if not known:
        return
    found = fingerprint_of(data, folder, checkout)
    others = [run for fingerprint, run in known.items() if fingerprint != found]
    if found and others:
        raise DataError(
            f"{folder} holds other images than {others[0] / LOG_NAME} was trained on (fingerprint {found:.8}, not "
            f"{logged_fingerprint(others[0]):.8}); bring back the folder of that run, or begin another grid with "
            "--work_dir and --results"
        )


def logged_fingerprint(run: Path) -> str:
    """Return the fingerprint in the first line of a run's log, or "" if there is none."""
    try:
        with open(run / LOG_NAME, "rb") as log:
            said = parse_note(log.readline()).get("data")
    except (OSError, ValueError, AttributeError):  # no log yet, or half a line, which its reader will report
        return ""
    return said if isinstance(said, str) else ""


def fingerprint_of(data: DataSet, folder: Path, checkout: Checkout) -> str:
    """Return the fingerprint of a data folder. If the grid's code cannot compute it, warn and return ""."""
    code = "import sys; from pathlib import Path; " + (DETECTOR if data.is_detection else CLASSIFIER)
    done = checkout.run([sys.executable, "-c", code, str(folder.resolve())])
    if done.returncode:
        warn(f"whether {folder} holds the images of the runs before is not known ({last_line(done)})")
    return done.stdout.strip()
