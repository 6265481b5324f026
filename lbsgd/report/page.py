"""The page of a run or a group of runs: one HTML file that contains its numbers, script and style."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbsgd.disk import rewrite_file
from lbsgd.errors import ConfigError

if TYPE_CHECKING:
    from jinja2 import Template

PAGE_NAME = "index.html"
RELOAD_SECONDS = 15


@dataclass(frozen=True)
class Series:
    """A line of a chart; low and high are the borders of its band.

    mark    "hollow": points that no line joins; "cross": marks at the top of the chart, for x without a number
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    mark: str = ""

    def as_dict(self) -> dict[str, Any]:
        values = {"x": self.x, "y": self.y, "low": self.low, "high": self.high}
        numbers = {key: rounded(column) for key, column in values.items() if column is not None}
        return {"name": self.name, **numbers, **({"mark": self.mark} if self.mark else {})}


@dataclass(frozen=True)
class Chart:
    """A chart of the page. `step` holds each value until the next one; `log` and `logx` are for its axes."""

    title: str
    series: Sequence[Series]
    unit: str = ""
    xname: str = "epoch"
    log: bool = False
    logx: bool = False
    step: bool = False
    xmax: float | None = None

    def as_dict(self) -> dict[str, Any]:
        unit = self.unit and f" {self.unit}"  # printed after a number
        return {**vars(self), "unit": unit, "series": [series.as_dict() for series in self.series]}


@dataclass(frozen=True)
class Fact:
    """A line of a list of facts; `paper` is the paper's value if it differs."""

    name: str
    value: str
    paper: str | None = None


@dataclass(frozen=True)
class Section:
    """A part of the page: a table, charts, facts and a command, all optional.

    words    whether the table's cells are words, which wrap, and not numbers
    """

    title: str = ""
    note: str = ""
    heads: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    charts: Sequence[Chart] = ()
    facts: Sequence[Fact] = ()
    command: str = ""
    words: bool = False


@dataclass(frozen=True)
class Page:
    """The content of a page. The page of a running job is unfinished, and reloads itself."""

    title: str
    status: str
    sections: Sequence[Section] = field(default_factory=tuple)
    finished: bool = True

    def html(self) -> str:
        charts = [chart.as_dict() for section in self.sections for chart in section.charts]
        numbered = iter(range(len(charts)))
        sections = [{**vars(section), "charts": [next(numbered) for _ in section.charts]} for section in self.sections]
        page = {
            "title": self.title,
            "status": self.status,
            "sections": sections,
            "reload_seconds": None if self.finished else RELOAD_SECONDS,
        }
        from jinja2.utils import markupsafe  # late, as below

        embedded = json.dumps(charts, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        parts = {"charts": embedded, "css": asset("page.css"), "js": asset("page.js")}
        return template().render(page=page, **{name: markupsafe.Markup(text) for name, text in parts.items()})

    def write(self, folder: Path) -> Path:
        """Write index.html, whole or not at all. Raises ConfigError if it cannot be written.

        The page is not forced to the disk: training would wait for that, and the log can make the page again.
        """
        path = folder / PAGE_NAME
        try:
            rewrite_file(path, self.html().encode(errors="replace"), to_the_disk=False)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}; choose another folder") from error
        return path


def rounded(values: Sequence[float | None]) -> list[float | None]:
    """Return the values rounded to five digits, integers in full; None for NaN and infinity."""
    finite = (value if value is not None and math.isfinite(value) else None for value in values)
    return [value if value is None or isinstance(value, int) else float(f"{value:.5g}") for value in finite]


@cache
def template() -> Template:
    from jinja2 import Environment, StrictUndefined  # late: only pages need it

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string(asset("page.html.j2"))


@cache
def asset(name: str) -> str:
    return (files("lbsgd.report") / "assets" / name).read_text(encoding="utf-8")
