"""Write and read the run log, `log.jsonl` in the run's folder; tables and curves are made from it.

The log is strict JSON, one object per line. `kind` is the type of the line. The keys in `log_lines.KEYS` are always
there; others are optional. `judged_by` in the first line names the numbers that the run is judged by
(`report.measure`), here those of a classifier. Every record of an evaluation has them:

    {"kind": "run", "model": "resnet50", "global_batch": 8192, ..., "environment": {...}}    the first line, and only it
    {"kind": "iteration", "iteration": 0, "epoch": 0.0, "lr": 0.1, "train_loss": 6.91, ...}
    {"kind": "epoch", "epoch": 1, "train_top1_error_pct": 97.1, "val_top1_error_pct": 93.5, ...}
    {"kind": "resume", "iteration": 156, ...}    the run continued from a checkpoint here
    {"kind": "result", "val_top1_error_pct": 23.74, ...}    the last line of a run that reached its end
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lbsgd.disk import exists, is_dir, is_still_at, is_there, replace_file
from lbsgd.errors import ConfigError, DataError, DivergedError
from lbsgd.report.earlier_log import earlier_log
from lbsgd.report.log_lines import KEYS, LOG_NAME, Expected, Record, missing_leaves, read_records
from lbsgd.report.measure import Measure, measures_of, require_measures

DIVERGED = "diverged.txt"  # next to the log of a run whose loss was not a number


class RunLog:
    """Write the log of one run; only rank 0 opens one.

    header              {"model": its name, **plan.as_dict(), "environment": {...}}
    resume_iteration    iterations already done in the checkpoint; None begins a new log
    begin               called after all checks, just before the log changes

    A resumed log keeps the lines from before that iteration and drops the work that is done again, so an interrupted
    run reads as one run. `epochs` holds the epoch records so far, including those from before the interruption;
    `lost_epochs` names those that the log lacks. A DivergedError that ends the run is written into the file DIVERGED
    next to the log.

    Raises ConfigError if the folder cannot be written or already holds a run, and DataError if the log is broken.
    """

    def __init__(
        self,
        folder: str | Path,
        header: Record,
        resume_iteration: int | None = None,
        begin: Callable[[], None] = lambda: None,
    ):
        self.path = Path(folder) / LOG_NAME
        self.epochs: list[Record] = []
        self.lost_epochs: list[int] = []
        self._again: Record = {}
        self.header = header
        self._expected = Expected(measures_of(header))
        self._unwritten = b""  # lines that the disk has not taken yet, perhaps because it is full
        if resume_iteration is None and is_there(self.path):
            raise ConfigError(f"{folder} already holds a run: continue it with --resume or choose another --output_dir")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self._first_lines(header, resume_iteration)
            begin()
            self.path.with_name(DIVERGED).unlink(missing_ok=True)
            replace_file(self.path, lines)
            self._file = open(self.path, "a+b", buffering=0)
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror}") from error

    def iteration(self, record: Record) -> None:
        self._write("iteration", record)

    def epoch(self, record: Record) -> None:
        if record["epoch"] == self._again.get("epoch"):  # its evaluation holds, even if none is due here any more
            record = self._again | record
        self.epochs.append(record)
        self._write("epoch", record)

    def result(self) -> Record:
        """Write the last line, which has the numbers that the run is judged by, and return it."""
        result = {measure.key: measure.of(self.epochs) for measure in measures_of(self.header)}
        self._write("result", result)
        return result

    def put_back(self) -> bool:
        """Write the log anew, whole, if it was removed, moved or replaced. Return whether it was. Raises OSError."""
        if is_still_at(self.path, self._file):
            return False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file.seek(0)
        replace_file(self.path, self._file.read())  # the system keeps an open file, whatever becomes of its name
        with self._file:
            self._file = open(self.path, "a+b", buffering=0)
        return True

    def close(self) -> None:
        with self._file:
            self._write_on()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, DivergedError):
            with suppress(OSError):  # on a full disk the run counts as not finished
                replace_file(self.path.with_name(DIVERGED), f"{error.label}: {error}\n".encode())
        self.close()

    def _first_lines(self, header: Record, resume_iteration: int | None) -> bytes:
        """Return the lines before the first new record."""
        records = [{"kind": "run", **header}]
        if resume_iteration is not None:
            # A checkpoint is usable without its log, which may be lost or in another folder. The log then begins there.
            # Without a checkpoint nothing shows that the log belongs to this run, so a new one begins.
            if resume_iteration and exists(self.path):
                open(self.path, "ab").close()  # raises an OSError if the file may not be written
                earlier = earlier_log(resume_iteration, self.path)
                records, self._again, self.lost_epochs = earlier.kept, earlier.again, earlier.lost
                require_measures(records[0], header, self.path)
            self.epochs = [record for record in records if record["kind"] == "epoch"]
            records.append({"kind": "resume", **header, "iteration": resume_iteration})
        expected = Expected(measures_of(records[0]))
        return b"".join(_line(record, expected) for record in records)

    def _write(self, kind: str, record: Record) -> None:
        self._unwritten += _line({"kind": kind, **record}, self._expected)
        self._write_on()

    def _write_on(self) -> None:
        """Write what is not written yet. If the disk takes only a part, the rest stays for the next call."""
        # Unbuffered, so that a killed run leaves at most its last line incomplete, and because Python's own buffer
        # drops lines once it holds 8 KiB that the disk has not taken.
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]


@dataclass(frozen=True)
class LoggedRun:
    """A run as logged: the first line, the records of each kind, and the result if the run has reached its end.

    resumes    a record for each time that the run was continued, with what a first line would say then
    """

    path: Path
    header: Record
    iterations: list[Record]
    epochs: list[Record]
    result: Record | None
    resumes: Sequence[Record] = ()

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The numbers that the run is judged by, the most important first."""
        return measures_of(self.header)

    @property
    def headlines(self) -> list[Measure]:
        """The measures that screen and tables show."""
        return [measure for measure in self.measures if measure.headline]

    @property
    def value(self) -> float | None:
        """The run's number of its first measure: a classifier's error."""
        return self.measures[0].of(self.epochs)

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the images; logs of earlier versions have none."""
        return self.header.get("data")

    def curve(self, key: str) -> dict[float, Any]:
        """Return a number by epoch. Epochs without it, such as those without an evaluation, are left out."""
        return {record["epoch"]: record[key] for record in self.epochs if key in record}

    @property
    def epochs_done(self) -> float:
        return self.epochs[-1]["epoch"] if self.epochs else 0

    @property
    def planned_epochs(self) -> float:
        """The epochs of the whole run. They may have a fraction if the run is counted in iterations."""
        header = self.header
        return header["recipe"].get("epochs") or header["num_iterations"] / header["iterations_per_epoch"]

    @property
    def reached_its_plan(self) -> bool:
        """Whether the last epoch of the plan is in the log. Iterations are compared, because fractions are rounded."""
        per_epoch = self.header["iterations_per_epoch"]
        return round(self.epochs_done * per_epoch) >= round(self.planned_epochs * per_epoch)


def read_run(path: str | Path) -> LoggedRun:
    """Read a log, given as its file or as the run's folder. A last line that a kill cut short is left out.

    Raises DataError if there is no log, or, with its number, if a line does not belong in a run log.
    """
    path = Path(path)
    path = path / LOG_NAME if is_there(path) and is_dir(path) else path
    records = read_records(path)
    by_kind = {kind: [record for record in records if record["kind"] == kind] for kind in KEYS}
    result = by_kind["result"][-1] if by_kind["result"] else None
    return LoggedRun(path, records[0], by_kind["iteration"], by_kind["epoch"], result, by_kind["resume"])


def require_reportable(run: LoggedRun) -> None:
    """Raise DataError if the first line lacks what a report needs, or if records lie outside the planned epochs.

    The epochs must also increase, or the last epochs of the run would be wrong.
    """
    if missing := missing_leaves(run.header):
        raise DataError(f"{run.path}, line 1: not a run log: run without {', '.join(missing)}")
    most = math.ceil(run.planned_epochs)
    places = [record["epoch"] for record in (*run.iterations, *run.epochs)]
    places += [record["iteration"] / run.header["iterations_per_epoch"] for record in run.iterations]
    if beyond := [place for place in places if not 0 <= place <= most]:
        raise DataError(f"{run.path}: not a run log: a record at epoch {beyond[0]:g}, of {most:g} that were planned")
    epochs = [record["epoch"] for record in run.epochs]
    if back := [pair for pair in pairwise(epochs) if pair[0] >= pair[1]]:
        raise DataError(f"{run.path}: not a run log: epoch {back[0][1]:g} comes after epoch {back[0][0]:g}")


def _line(record: Record, expected: Expected) -> bytes:
    missing = expected.missing(record)
    assert not missing, f"{record['kind']} record without {missing}"
    return json.dumps(_strict(record), allow_nan=False).encode() + b"\n"


def _strict(value: Any) -> Any:
    """Replace NaN and infinity, which strict JSON lacks, by null."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
