"""Synchronous against asynchronous updates, simulated: at equal images, and at equal simulated time.

Worker times are log-normal with a spread of 0.3 (`recipes/asynchronous.py`). The claim: at equal images, gradients at
old weights are worse.
"""

from __future__ import annotations

from lbsgd.experiments.grid import Claim, DataSet, Row, Study
from lbsgd.report.group_page import band_of
from lbsgd.report.groups import Group
from lbsgd.report.measure import TOP1
from lbsgd.report.page import Chart, Section, Series
from lbsgd.report.paper_table import error_cell, without_result

SCRIPT = "recipes/asynchronous.py"
NAMES = {"async": "asynchronous", "sync": "synchronous"}


def rows(data: DataSet) -> tuple[Row, ...]:
    if data.name != "digits":
        return ()  # the recipe's network is for the digits only
    return tuple(
        Row(f"x{data.large}_simulated_{kind}", data.large, script=SCRIPT, flags=("--updates", kind), is_simulated=True)
        for kind in NAMES
    )


def claims(data: DataSet) -> tuple[Claim, ...]:
    names = [row.name for row in rows(data)]
    return (Claim("at equal images asynchronous updates are worse than synchronous ones", names[0], "worse", names[1]),)


def sections(data: DataSet, groups: dict[str, Group]) -> list[Section]:
    """Return both curves over epochs and over simulated time."""
    labels = {name: NAMES[name.rsplit("_", 1)[1]] for name in groups}
    over_epochs = [
        band_of(", ".join([labels[name], *without_result(group)]), group.shown, TOP1.key)
        for name, group in groups.items()
    ]
    over_time = [in_time(series, groups[name]) for name, series in zip(groups, over_epochs, strict=True)]
    heads = ("updates", "error %", "seeds", "mean staleness", "simulated time")
    cells = [[labels[name], *simulated_cells(group)] for name, group in groups.items()]
    charts = [
        Chart("validation error at equal images, mean ± std (band: 2 std)", over_epochs, "%"),
        Chart("validation error at equal simulated time", over_time, "%", "mean times of one gradient"),
    ]
    return [Section("Synchronous and asynchronous updates", "simulated workers, see the recipe", heads, cells, charts)]


def last(group: Group, key: str) -> float:
    """Return the mean over seeds of a number in the last epoch."""
    return sum(run.epochs[-1][key] for run in group.finished) / len(group.finished)


def simulated_cells(group: Group) -> list[str]:
    numbers = ("-", "-")
    if group.finished:
        numbers = f"{last(group, 'staleness'):.1f}", f"{last(group, 'simulated_time'):,.0f}"
    return [error_cell(group), str(len(group.runs)), *numbers]


def in_time(series: Series, group: Group) -> Series:
    times = zip(*([record["simulated_time"] for record in run.epochs] for run in group.shown), strict=False)
    return Series(series.name, [sum(column) / len(column) for column in times], series.y, series.low, series.high)


STUDY = Study("async", "synchronous and asynchronous updates", "Sec. 6", rows, claims, sections, grid="async")
