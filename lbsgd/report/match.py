"""Curve match, the paper's early proxy for the final error (Sec. 5.2): does training follow the baseline?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from lbsgd.report.groups import Group
from lbsgd.report.measure import TRAIN_TOP1
from lbsgd.report.run_log import LoggedRun
from lbsgd.report.statistics import student

POINTS = 0.5  # the band is never narrower
MEANING = (
    "Curves match from the epoch from which the mean training error stays within 2 std of the baseline's mean, or "
    f"within {POINTS} points where that is more, to the end."
)
SEEDS = 3  # of the baseline, to compare a running job with its band

FIRST_PART = 1 / 3  # of the epochs, which claims leave out: large batches lag there in the paper's Figure 3, too

CAUSES = "no warmup, a global batch beyond the elbow of the linear rule (Fig. 1), or weight decay on batch norm"


@dataclass(frozen=True)
class Match:
    """The epoch from which training stays in the baseline's band, None if never; known: whether it can be computed."""

    epoch: float | None
    known: bool = True

    @property
    def words(self) -> str:
        if not self.known:
            return "-"
        return "never" if self.epoch is None else f"from epoch {self.epoch:g}"


def mean_curve(runs: Sequence[LoggedRun], key: str) -> dict[float, float]:
    """Return the mean over runs for each epoch that all runs have reached; NaN if none has a number."""
    return {epoch: mean(values) if values else math.nan for epoch, values in of_epochs(runs, key).items()}


def std_curve(runs: Sequence[LoggedRun], key: str) -> dict[float, float]:
    """Return the standard deviation over runs for each epoch; 0 for a single run."""
    return {epoch: stdev(values) if len(values) > 1 else 0.0 for epoch, values in of_epochs(runs, key).items()}


def of_epochs(runs: Sequence[LoggedRun], key: str) -> dict[float, list[float]]:
    """Return the runs' numbers for each epoch in which all of them have logged this key. A null is left out."""
    columns = [run.curve(key) for run in runs]
    common = [epoch for epoch in columns[0] if all(epoch in each for each in columns)] if columns else []
    return {epoch: [each[epoch] for each in columns if each[epoch] is not None] for epoch in common}


def band(baseline: Sequence[LoggedRun]) -> dict[float, tuple[float, float]]:
    """Return the lower and upper border of the band in each epoch: mean training error ± max(2 std, 0.5 points)."""
    widths = {epoch: max(2 * std, POINTS) for epoch, std in std_curve(baseline, TRAIN_TOP1).items()}
    return {epoch: (m - widths[epoch], m + widths[epoch]) for epoch, m in mean_curve(baseline, TRAIN_TOP1).items()}


def limits(baseline: Sequence[LoggedRun]) -> dict[float, float]:
    """Return the upper limit of one more seed's training error, for each epoch that at least two of s seeds have:

    mean + max(t(0.975, s - 1) · std · √(1 + 1/s), 0.5 points)

    √(1 + 1/s) because the new seed varies as well as the mean. Without the floor, 1 of 40 new seeds lies higher.
    """
    return {epoch: limit(values) for epoch, values in of_epochs(baseline, TRAIN_TOP1).items() if len(values) > 1}


def limit(values: Sequence[float]) -> float:
    """Return the upper end of the 95 % prediction interval for one more value, at least POINTS above the mean."""
    s = len(values)
    return mean(values) + max(student(s - 1) * stdev(values) * math.sqrt(1 + 1 / s), POINTS)


def distances(row: Group, baseline: Group, left_out: float = FIRST_PART) -> list[float]:
    """Return how many points each finished run's training error lies from the baseline's mean, on average:

    mean over epochs of |error - mean of the baseline's seeds|        without the first part of the epochs
    """
    center = {epoch: mean(values) for epoch, values in of_epochs(baseline.finished, TRAIN_TOP1).items() if values}
    counted = [epoch for epoch in center if epoch > left_out * max(center)]
    curves = [run.curve(TRAIN_TOP1) for run in row.finished]
    apart = [[abs(error - center[e]) for e in counted if (error := curve.get(e)) is not None] for curve in curves]
    return [mean(each) for each in apart if each]


def matched_from(row: Group, baseline: Group) -> Match:
    """Return the epoch from which the row's mean training curve stays inside the baseline's band to the end.

    It is not known if the runs log no training error of a classifier, if the rows have logged different epochs, or if a
    seed of either row has diverged.
    """
    if not row.whole or not baseline.whole:
        return Match(None, known=False)
    curve, borders = mean_curve(row.finished, TRAIN_TOP1), band(baseline.finished)
    if not curve or curve.keys() != borders.keys():
        return Match(None, known=False)
    first = None
    for epoch in sorted(curve, reverse=True):
        low, high = borders[epoch]
        if not low <= curve[epoch] <= high:
            break
        first = epoch
    return Match(first)
