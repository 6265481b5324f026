"""The log that a resumed run finds in its folder, and the lines of it that stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lbsgd.disk import is_there
from lbsgd.errors import DataError
from lbsgd.report.log_lines import LOG_NAME, Record, read_records


def has_epochs(folder: Path) -> bool:
    """Return whether there is a log and it tells of an epoch. Raises DataError if it is broken."""
    path = folder / LOG_NAME
    return is_there(path) and any(record["kind"] == "epoch" for record in read_earlier(path, 0))


@dataclass(frozen=True)
class EarlierLog:
    """The log of a run that goes on after `iteration` updates.

    kept     the records of work that was complete then
    again    the record of the epoch that ended just then, which the run writes again; empty if there is none
    lost     the epochs before it that the log lacks
    """

    kept: list[Record]
    again: Record
    lost: list[int]


def earlier_log(iteration: int, path: Path) -> EarlierLog:
    """Read the log of a run that goes on. Raises DataError if it is broken."""
    records = read_earlier(path, iteration)
    per_epoch = int(records[0]["iterations_per_epoch"])
    ended = {round(record["epoch"] * per_epoch): record for record in records if record["kind"] == "epoch"}
    # A log that was lost as a whole begins where the run then went on.
    begins = records[1]["iteration"] if len(records) > 1 and records[1]["kind"] == "resume" else 0
    ends = range(per_epoch, iteration, per_epoch)
    lost = [end // per_epoch for end in ends if end > begins and end not in ended]
    return EarlierLog(happened_before(iteration, records), ended.get(iteration, {}), lost)


def read_earlier(path: Path, iteration: int) -> list[Record]:
    """Return the records of the log of a run that goes on at an iteration."""
    try:
        return read_records(path)
    except DataError as error:
        if isinstance(error.__cause__, OSError):
            raise
        raise DataError(
            f"{error}; put it back from a copy, or delete it: a new log then begins at iteration {iteration}"
        ) from None


def happened_before(iteration: int, records: Sequence[Record]) -> list[Record]:
    """Keep the records of work that was complete after `iteration` updates. Drop a result, because the run goes on."""
    per_epoch = records[0]["iterations_per_epoch"]
    over_at: dict[str, Callable[[Record], float]] = {
        "run": lambda record: 0,
        "iteration": lambda record: record["iteration"] + 1,
        "epoch": lambda record: round(record["epoch"] * per_epoch) + 1,  # a run resumed there writes it again
        "resume": lambda record: record["iteration"],
        "result": lambda record: math.inf,
    }
    return [record for record in records if over_at[record["kind"]](record) <= iteration]
