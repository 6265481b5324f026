"""The page of a group of runs: the paper's tables beside ours, and the curves of each table's rows."""

from __future__ import annotations

from collections.abc import Sequence

from lbsgd.report.groups import Family, Group
from lbsgd.report.match import mean_curve, std_curve
from lbsgd.report.page import Chart, Fact, Page, Section, Series
from lbsgd.report.paper_tables import HEADS, OURS, PaperTable, our_cells, paper_tables, place_of, wanted
from lbsgd.report.run_log import LoggedRun
from lbsgd.report.run_page import configuration, described, lr_chart


def group_page(
    title: str, families: Sequence[Family], tables: Sequence[str] = (), answers: Sequence[Section] = ()
) -> Page:
    """Return the page of all families, those with the most rows first.

    tables: names of those wanted, all by default
    answers: sections that go before the environment, such as the claims that an experiment was run for
    """
    sections = [section for family in families for section in sections_of(family, tables)]
    runs = [run for family in families for row in family.rows for run in row.runs]
    finished = sum(run.result is not None for run in runs)
    return Page(
        title,
        f"{finished} of {len(runs)} runs are finished",
        [*sections, *answers, *origin(families)],
        finished == len(runs),
    )


def sections_of(family: Family, tables: Sequence[str]) -> list[Section]:
    found = wanted(paper_tables(family), tables)
    if found:
        return [table_section(family, table) for table in found]
    rows = [[family.label(row), *our_cells(family, row)] for row in family.rows]
    measure = family.rows[0].measure
    heads = ["", *HEADS[OURS]]
    heads[3] = f"{measure.short} {measure.unit}".rstrip()
    return [Section(place_of(family), "", heads, rows, curve_charts(family, family.rows))]


def table_section(family: Family, table: PaperTable) -> Section:
    heads = [f"paper {head}" if 1 <= number < 4 else head for number, head in enumerate(HEADS)]
    heads[4] = f"ours {HEADS[4]}"
    charts = curve_charts(family, table.groups)
    if table.name.startswith("figure1"):
        charts = [batch_chart(family, table.groups), *charts]
    measure = table.groups[0].measure
    judged = f"A run's {measure.short} is the {measure.how.replace('of last', 'of its last')}."
    note = f"Paper: ResNet-50 on ImageNet, ours: {table.ours}. {judged}"
    return Section(table.title, note, heads, table.rows, charts)


def curve_charts(family: Family, rows: Sequence[Group]) -> list[Chart]:
    planned = max(run.planned_epochs for row in rows for run in row.runs)
    charts = [
        Chart(f"{name}, mean ± std (band: 2 std)", [band(family, row, key) for row in rows], unit)
        for name, key, unit in curve_keys(rows[0].runs[0])
    ]
    return [*charts, lr_chart([(name_of(family, row), row.runs[0]) for row in rows], planned)]


def curve_keys(run: LoggedRun) -> list[tuple[str, str, str]]:
    """Return name, key in the log and unit of the curves over epochs that a run has."""
    found = []
    for measure in (measure for measure in run.measures if measure.headline):
        unit = measure.unit and f" {measure.unit}"
        found.append((f"validation {measure.short}", measure.key, unit))
        found += [(f"training {measure.short}", measure.training, unit)] if measure.training else []
    return found


def name_of(family: Family, row: Group) -> str:
    return f"{family.label(row)}, {row.global_batch:,}"


def band(family: Family, row: Group, key: str) -> Series:
    return band_of(name_of(family, row), row.finished or row.runs, key)


def band_of(name: str, runs: Sequence[LoggedRun], key: str) -> Series:
    """Return the mean over runs per epoch, and ± 2 std where there are several."""
    means, stds = mean_curve(runs, key), std_curve(runs, key)
    epochs = [record["epoch"] for record in min((run.epochs for run in runs), key=len, default=[])]
    if len(runs) < 2:
        return Series(name, epochs, means)
    low = [value - 2 * std for value, std in zip(means, stds, strict=True)]
    high = [value + 2 * std for value, std in zip(means, stds, strict=True)]
    return Series(name, epochs, means, low, high)


def batch_chart(family: Family, rows: Sequence[Group]) -> Chart:
    """Return the error over the global batch (Fig. 1)."""
    known = [(row.global_batch, row.spread) for row in rows if row.spread]
    means, stds = [spread.mean for _, spread in known], [spread.std or 0.0 for _, spread in known]
    low = [value - 2 * std for value, std in zip(means, stds, strict=True)]
    high = [value + 2 * std for value, std in zip(means, stds, strict=True)]
    series = Series("linear rule, gradual warmup", [kn for kn, _ in known], means, low, high)
    measure = rows[0].measure
    name, unit = f"validation {measure.short} over the global batch", measure.unit and f" {measure.unit}"
    return Chart(name, [series], unit, "images per update", logx=True)


def origin(families: Sequence[Family]) -> list[Section]:
    """Return where the runs come from, told by the first of the largest family."""
    if not families:
        return []
    header = families[0].rows[0].header
    environment = {key: value for key, value in header.get("environment", {}).items() if key != "started"}
    facts: list[Fact] = described(environment)
    return [Section("Configuration of the baseline", facts=configuration(header)), Section("Environment", facts=facts)]
