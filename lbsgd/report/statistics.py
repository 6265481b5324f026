"""The paper's statistic (Sec. 5.1), and how far two rows of a table may lie apart.

A run's error is the median of its last 5 epochs (`measure.Measure.of`), a row's the mean ± standard deviation.
"No difference" is never inferred from a large p-value: the interval must lie inside a margin fixed beforehand.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import comb
from statistics import mean, stdev
from typing import NamedTuple


class Spread(NamedTuple):
    """Mean and sample standard deviation (n - 1) of a row's errors; one seed has no deviation."""

    mean: float
    std: float | None

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"


def spread(errors: Sequence[float]) -> Spread | None:
    """Return mean and standard deviation over seeds; None without errors."""
    if not errors:
        return None
    return Spread(mean(errors), stdev(errors) if len(errors) > 1 else None)


class Difference(NamedTuple):
    """A difference of two means in points, with its 95 % confidence interval. The interval needs seeds that differ."""

    value: float
    low: float | None
    high: float | None

    def opposite(self) -> Difference:
        """Return the difference with the opposite sign."""
        if self.low is None or self.high is None:
            return Difference(-self.value, None, None)
        return Difference(-self.value, -self.high, -self.low)

    def __str__(self) -> str:
        value = f"{self.value:+z.2f}"
        return value if self.low is None else f"{value} [{self.low:+z.2f}, {self.high:+z.2f}]"


def difference(errors: Sequence[float], baseline: Sequence[float]) -> Difference | None:
    """Return mean(errors) - mean(baseline) with Welch's 95 % interval (variances may differ); None without errors.

    There is no interval without two seeds of each row. Nor is there one if the errors within each row are all equal,
    as a few coarse errors may be by chance.

    d ± t(0.975, ν) · √(s₁²/n₁ + s₂²/n₂)        ν by Welch and Satterthwaite, as scipy computes it
    """
    if not errors or not baseline:
        return None
    value = mean(errors) - mean(baseline)
    if len(errors) < 2 or len(baseline) < 2:
        return Difference(value, None, None)
    if max(stdev(errors), stdev(baseline)) < 1e-9:  # equal except for rounding
        return Difference(value, None, None)
    from scipy.stats import ttest_ind  # late: it takes a second, and a run's own report does not need it

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy warns if one row's errors are all equal
        interval = ttest_ind(errors, baseline, equal_var=False).confidence_interval(0.95)
    return Difference(value, float(interval.low), float(interval.high))


def student(degrees: int) -> float:
    """Return t(0.975, ν), the factor of a 95 % confidence interval, for ν degrees of freedom."""
    from scipy.special import stdtrit  # late: few commands need it

    return float(stdtrit(degrees, 0.975))


def fisher(lost: int, num_seeds: int, lost_beside: int, num_beside: int) -> float:
    """Return Fisher's exact one-sided p: the probability that chance gives this row at least as many lost seeds.

    Σ C(n₁, i) · C(n₂, m - i) / C(n₁ + n₂, m)        over i ≥ lost, m = all lost seeds of the two rows
    """
    total = lost + lost_beside
    ways = sum(comb(num_seeds, i) * comb(num_beside, total - i) for i in range(lost, total + 1))
    return ways / comb(num_seeds + num_beside, total)


def verdict(kind: str, apart: Difference | None, margin: float) -> bool | None:
    """Whether a claim holds by its interval and the margin; None if no interval could be computed.

    same        -margin < low and high < margin
    no worse    high < margin
    worse       low > 0
    """
    if apart is None or apart.low is None or apart.high is None:
        return None
    if kind == "worse":
        return apart.low > 0
    if kind == "no worse":
        return apart.high < margin
    assert kind == "same", kind
    return -margin < apart.low and apart.high < margin
