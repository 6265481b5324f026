"""The images of a grid: those that go on must have the ones that the finished runs were trained on."""

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

# What a log's first line has as `data`, by the code that trains: it alone knows its own fingerprints.
CLASSIFIER = "from lbsgd.data.folder import open_data; print(open_data(sys.argv[1]).fingerprint)"
DETECTOR = (
    "from lbsgd.data.coco_annotations import read_split as read; train = read(Path(sys.argv[1]), 'train'); "
    "val = read(Path(sys.argv[1]), 'val', training=False); "
    "print(train.fingerprint, len(train), val.fingerprint, len(val))"
)


def require_same_data(data: DataSet, folder: Path, runs: Iterable[Path], checkout: Checkout) -> None:
    """Raise DataError where a run's log, in one of the folders `runs`, names other images than the data folder holds.

    They would be rows of other data, which no claim compares. Logs of earlier versions name none.
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
    """Return the fingerprint in the first line of a run's log, or nothing."""
    try:
        with open(run / LOG_NAME, "rb") as log:
            said = parse_note(log.readline()).get("data")
    except (OSError, ValueError, AttributeError):  # none yet, or half a line; its reader will say so
        return ""
    return said if isinstance(said, str) else ""


def fingerprint_of(data: DataSet, folder: Path, checkout: Checkout) -> str:
    """Return the fingerprint of a data folder; nothing, and a warning, where the grid's code cannot tell it."""
    code = "import sys; from pathlib import Path; " + (DETECTOR if data.is_detection else CLASSIFIER)
    done = checkout.run([sys.executable, "-c", code, str(folder.resolve())])
    if done.returncode:
        warn(f"whether {folder} holds the images of the runs before is not known ({last_line(done)})")
    return done.stdout.strip()
