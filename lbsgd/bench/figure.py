"""One measured figure: a value with its interval, and the goal that was set before the measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import exp, log, sqrt
from statistics import mean, stdev
from typing import Any, Literal

from lbsgd.report.statistics import student


@dataclass(frozen=True)
class Goal:
    """A bound that a figure should keep, fixed before the measurement. `within`, for a ratio, means 1 ± the bound."""

    kind: Literal["at most", "at least", "within"]
    bound: float

    def __str__(self) -> str:
        return "{:g} to {:g}".format(*self.ends) if self.kind == "within" else f"{self.kind} {self.bound:g}"

    @property
    def ends(self) -> tuple[float, ...]:
        return (1 - self.bound, 1 + self.bound) if self.kind == "within" else (self.bound,)

    def keeps(self, value: float) -> bool:
        if self.kind == "within":
            return abs(value - 1) <= self.bound
        return value <= self.bound if self.kind == "at most" else value >= self.bound


@dataclass(frozen=True)
class Figure:
    """A value, its 95 % confidence interval if it has one, and the number of rounds or runs behind it.

    beside    plain numbers that explain the value, such as the milliseconds of both sides of a ratio
    seconds   of each round, for each step that was timed
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    count: int = 1
    unit: str = ""
    goal: Goal | None = None
    beside: str = ""
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Whether the goal is `reached` or `missed`, or `undecided` because the bound lies inside the interval."""
        if self.goal is None:
            return ""
        if self.low is not None and self.high is not None and any(self.low < end < self.high for end in self.goal.ends):
            return "undecided"
        return "reached" if self.goal.keeps(self.value) else "missed"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "goal": self.goal and str(self.goal), "verdict": self.verdict}


def mean_figure(name: str, values: Sequence[float], **more: Any) -> Figure:
    """Return the mean of some values, m ± t(0.975, N − 1) · s/√N; a single value has no interval."""
    middle, half = mean(values), half_width(values)
    low, high = (None, None) if half is None else (middle - half, middle + half)
    return Figure(name, middle, low, high, len(values), **more)


def ratio_figure(name: str, above: Sequence[float], below: Sequence[float], **more: Any) -> Figure:
    """Return the geometric mean of the rounds' ratios, with the interval of the mean of their logarithms.

    Both sides of a round are measured right after each other, so a slow machine slows both.
    """
    logs = mean_figure(name, [log(a / b) for a, b in zip(above, below, strict=True)])
    low, high = (None if bound is None else exp(bound) for bound in (logs.low, logs.high))
    return Figure(name, exp(logs.value), low, high, logs.count, **more)


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the mean's 95 % confidence interval (Student); None for a single value."""
    if len(values) < 2:
        return None
    return student(len(values) - 1) * stdev(values) / sqrt(len(values))
