"""The numbers that a run is judged by: their keys in the log, their names, and how epochs give a run's number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, Literal

from lbsgd.errors import ConfigError

LAST_EPOCHS = 5  # Sec. 5.1: the median over them is a run's error
LAST = "last evaluation"

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """One number of an evaluation. A task lists its measures (`train.task`), the most important first.

    key         its key in the log, in each evaluation and in the result
    name        its name in tables and pages; short: its name on the screen
    unit        its unit, printed after the number
    training    key of the same number on the training images, if the task computes it
    of_run      which evaluation a run is judged by: the median of the last 5 (Sec. 5.1), or the last one
    headline    whether screen and tables show it
    higher      whether more is better
    """

    key: str
    name: str
    short: str
    unit: str = ""
    training: str | None = None
    of_run: Literal["median", "last"] = "median"
    headline: bool = True
    higher: bool = False

    def of(self, epochs: Sequence[Record]) -> float | None:
        """Return the run's number; None if no evaluation gave one.

        If none of the last 5 epochs was evaluated, as in a running job with `--evaluate_every`, return the last number.
        """
        if self.of_run == "median" and (found := self.found(epochs[-LAST_EPOCHS:])):
            return median(found)
        return next(reversed(self.found(epochs)), None)

    def found(self, epochs: Sequence[Record]) -> list[float]:
        """Return the number of each evaluation that gave one."""
        return [epoch[self.key] for epoch in epochs if epoch.get(self.key) is not None]

    def best(self, epochs: Sequence[Record]) -> float | None:
        """Return the best number of any evaluation."""
        return (max if self.higher else min)(self.found(epochs), default=None)

    @property
    def how(self) -> str:
        """Say which evaluation a run is judged by."""
        return f"median of last {LAST_EPOCHS} epochs" if self.of_run == "median" else LAST

    def how_of(self, epochs: Sequence[Record]) -> str:
        """Say which evaluation `of` takes from these epochs."""
        found = len(self.found(epochs[-LAST_EPOCHS:]))
        if self.of_run == "median" and 1 < found < LAST_EPOCHS:
            return f"median of {found} evaluations in the last {LAST_EPOCHS} epochs"
        return self.how if found > 1 else LAST

    def words(self, value: float | None) -> str:
        """Return `23.74 %`, or `-` if there is no number."""
        return "-" if value is None else f"{value:.2f}{self.unit and ' ' + self.unit}"


TRAIN_TOP1 = "train_top1_error_pct"
TOP1 = Measure("val_top1_error_pct", "top-1 error", "error", "%", training=TRAIN_TOP1)
TOP5 = Measure("val_top5_error_pct", "top-5 error", "top-5", "%", headline=False)
CLASSIFIER = (TOP1, TOP5)
BOX_AP = Measure("val_box_ap", "box AP", "box AP", of_run="last", higher=True)
MASK_AP = Measure("val_mask_ap", "mask AP", "mask AP", of_run="last", higher=True)
DETECTOR = (BOX_AP, MASK_AP)


def as_data(measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """Return measures as plain data, for the first line of a log."""
    return [asdict(measure) for measure in measures]


def measures_of(header: Record) -> tuple[Measure, ...]:
    """Return the measures that the first line of a log names. Old logs name none; they are a classifier's.

    Fields that a later version added to a measure are left out.
    """
    named, known = header.get("judged_by"), {field.name for field in fields(Measure)}
    if named is None:
        return (TOP1,)
    return tuple(Measure(**{key: value for key, value in each.items() if key in known}) for each in named)


def require_measures(begun: Record, resumed: Record, log: Path) -> None:
    """Raise ConfigError if a resumed run lacks a number that its log, from the first line on, judges it by."""
    before, now = keys_of(measures_of(begun)), keys_of(measures_of(resumed))
    if lost := [key for key in before if key not in now]:
        raise ConfigError(
            f"{log} judges the run by {', '.join(lost)}, and the recipe's task by {', '.join(now)} alone; keep these in"
            " its judged_by, or begin a new run in another --output_dir"
        )


def keys_of(measures: Sequence[Measure]) -> list[str]:
    """Return the keys of all measures, on the training images, too."""
    return [key for each in measures for key in (each.key, each.training) if key]
