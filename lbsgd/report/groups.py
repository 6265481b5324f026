"""Make rows of runs: the seeds of one recipe are one row. The plan in the log decides which row a run belongs to."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from lbsgd.config.schema import NO_NUMBER
from lbsgd.disk import exists
from lbsgd.errors import DataError
from lbsgd.report.measure import Measure
from lbsgd.report.run_log import DIVERGED, LOG_NAME, LoggedRun, read_run, require_reportable
from lbsgd.report.seeds import one_of_each_seed, require_one_code
from lbsgd.report.statistics import Spread, spread

T = TypeVar("T")
SAME_IN_A_ROW = ("model", "global_batch", "precision", "schedule")
# Keys of the recipe in which the runs of one row may differ. Only the seed changes the numbers of a run.
NOT_A_ROW = ("seed", *NO_NUMBER)


class BadLogs(DataError):
    """All logs that cannot be read, each with its reason, so that they can be mended at once."""

    def __init__(self, reasons: Iterable[str]):
        self.reasons = tuple(dict.fromkeys(reasons))
        several = f"{len(self.reasons)} run logs cannot be read: " if len(self.reasons) > 1 else ""
        super().__init__(several + "; ".join(self.reasons))


def find_runs(places: Sequence[str | Path]) -> list[LoggedRun]:
    """Read the runs at these places, as `read_runs`.

    Raises BadLogs if a log or folder cannot be read, because no table may silently lack a run.
    """
    runs, bad = read_runs(places)
    if bad:
        raise BadLogs(bad)
    return runs


def read_runs(places: Sequence[str | Path]) -> tuple[list[LoggedRun], list[str]]:
    """Return the runs at these places, and the reason of each log and folder that cannot be read.

    A place is a log, a run's folder, or a folder with runs at any depth below it. Git checkouts below a place are
    skipped, because a grid's folder holds one with the published logs of its commit.
    """
    runs: dict[Path, LoggedRun] = {}
    bad: list[str] = []
    for place in places:
        logs, unread = logs_at(Path(place))
        bad += unread or ([] if logs else [f"no run log at {place}: give the folder of a run, which holds {LOG_NAME}"])
        for log in logs:
            try:
                run = read_run(log)
                require_reportable(run)
            except DataError as error:
                bad.append(f"{error}; mend it, or leave it out")
            else:
                runs.setdefault(run.path.resolve(), run)
    return list(runs.values()), list(dict.fromkeys(bad))


def logs_at(place: Path) -> tuple[list[Path], list[str]]:
    """Return the logs at a place, and the reason of each folder that cannot be read."""
    if os.path.exists(place / LOG_NAME) or (os.path.exists(place) and not os.path.isdir(place)):
        return [place], []
    found: list[Path] = []
    errors: list[OSError] = []
    for folder, names, files in os.walk(place, onerror=errors.append):
        if LOG_NAME in files:
            found.append(Path(folder, LOG_NAME))
        names[:] = [name for name in names if not os.path.exists(os.path.join(folder, name, ".git"))]
    unread = [
        f"cannot read {error.filename}: {error.strerror}; mend it, or leave it out"
        for error in errors
        if error.errno != errno.ENOENT
    ]
    return sorted(found), unread


@dataclass(frozen=True)
class Group:
    """The runs of one recipe, one per seed, in the order of their seeds."""

    runs: tuple[LoggedRun, ...]

    @property
    def header(self) -> dict[str, Any]:
        return self.runs[0].header

    @property
    def recipe(self) -> dict[str, Any]:
        return self.header["recipe"]

    @property
    def global_batch(self) -> int:
        return self.header["global_batch"]

    @property
    def factor(self) -> float:
        """The global batch as a multiple of base_batch, the batch that base_lr is given for."""
        return self.global_batch / self.base_batch

    @property
    def base_batch(self) -> int:
        return self.recipe["linear_scaling"]["base_batch"]

    @property
    def base_lr(self) -> float:
        return self.recipe["linear_scaling"]["base_lr"]

    @property
    def lr(self) -> float:
        return self.header["schedule"]["reference_lr"]

    @cached_property
    def finished(self) -> tuple[LoggedRun, ...]:
        return tuple(filter(has_finished, self.runs))

    @property
    def shown(self) -> tuple[LoggedRun, ...]:
        """The runs whose curves are drawn: the finished ones, or all if none has finished yet."""
        return self.finished or self.runs

    @property
    def measure(self) -> Measure:
        """The measure that rows are compared by, such as a classifier's error."""
        return self.runs[0].measures[0]

    @cached_property
    def values(self) -> list[float]:
        """The numbers of the finished runs: a classifier's errors in %, each the median of its last 5 epochs."""
        return self.values_of(self.measure)

    def values_of(self, measure: Measure) -> list[float]:
        return [value for run in self.finished if (value := measure.of(run.epochs)) is not None]

    @property
    def spread(self) -> Spread | None:
        return spread(self.values)

    @property
    def num_diverged(self) -> int:
        return sum(map(has_diverged, self.runs))

    @property
    def whole(self) -> bool:
        """Whether no seed has diverged. If some have, the others must not stand for all, so the row is not compared."""
        return not self.num_diverged

    @property
    def lost(self) -> bool:
        """Whether all seeds have diverged."""
        return self.num_diverged == len(self.runs)

    @property
    def ended_after(self) -> float | None:
        """The epochs of finished runs that ended early. Diverged runs do not count."""
        return ended_after(self.finished[0]) if self.finished else None


def has_finished(run: LoggedRun) -> bool:
    return run.result is not None and bool(run.epochs)


def has_diverged(run: LoggedRun) -> bool:
    """Return whether a run ended because its loss was not a number. A run restarted and finished has not diverged."""
    return not has_finished(run) and exists(run.path.parent / DIVERGED)


def group_runs(runs: Sequence[LoggedRun]) -> list[Group]:
    """Return the rows that the runs make, as `read_rows`.

    Raises DataError if some runs make no row, because no table may silently lack one.
    """
    rows, bad = read_rows(runs)
    if bad:
        raise DataError("; ".join(bad))
    return rows


def read_rows(runs: Sequence[LoggedRun]) -> tuple[list[Group], list[str]]:
    """Return the rows that runs make, and the reasons why other runs make none. A row's runs differ only in their seed.

    A run ended early by --epochs is a separate row, because its last epochs are different ones. Of several copies of a
    seed, the first with a result counts. Runs that differ in code, or copies of a seed with different numbers, make
    no row.
    """
    recipes: dict[str, dict[float | None, list[LoggedRun]]] = {}
    for run in runs:
        recipes.setdefault(row_key(run), {}).setdefault(ended_after(run), []).append(run)
    rows, bad = [], []
    for by_end in recipes.values():
        for alike in with_diverged(by_end, has_diverged):
            try:
                require_one_code(alike)
                rows.append(Group(tuple(one_of_each_seed(alike))))
            except DataError as error:
                bad.append(str(error))
    return sorted(rows, key=by_batch), bad


def by_batch(row: Group) -> tuple[str, int]:
    """Return the sort key of the order in which rows are shown."""
    return row.header["model"], row.global_batch


def with_diverged(by_end: dict[float | None, list[T]], diverged: Callable[[T], bool]) -> list[list[T]]:
    """Return the runs of a recipe, or the rows of a family, that belong together; by_end maps `ended_after` to them.

    A diverged run has no `ended_after`, so it does not show that it belongs to a trial of a few epochs. It is counted
    to the trial that ended last, unless another run was trained to its end or goes on.
    """
    early, others = sorted(end for end in by_end if end is not None), by_end.get(None, [])
    if not early or not all(map(diverged, others)):
        return list(by_end.values())
    *before, last = early
    return [*(by_end[end] for end in before), by_end[last] + others]


def row_key(run: LoggedRun) -> str:
    """Return a key of everything that the runs of one recipe share. How processes divide the work is not part of it."""
    numbers = {key: run.header.get(key) for key in (*SAME_IN_A_ROW, "started_from")}
    recipe = {key: value for key, value in run.header["recipe"].items() if key not in NOT_A_ROW}
    return json.dumps([numbers, recipe, run.header["config"]["optimizer"], run.fingerprint], sort_keys=True)


def ended_after(run: LoggedRun) -> float | None:
    """Return the epochs of a run that --epochs ended early; None if the run was trained to its end, or goes on."""
    return run.epochs_done if run.result is not None and not run.reached_its_plan else None
