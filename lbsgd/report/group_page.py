"""The page of a group of runs: the paper's tables next to ours, and the curves of each table's rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lbsgd.report.families import Family
from lbsgd.report.groups import Group
from lbsgd.report.match import MEANING, mean_curve, std_curve
from lbsgd.report.page import Chart, Fact, Page, Section, Series
from lbsgd.report.paper_table import FIRST_OF_OURS, PaperTable, note_of_codes, without_result
from lbsgd.report.paper_tables import COLUMNS, LAYOUTS, our_cells, tables_of
from lbsgd.report.run_log import LoggedRun
from lbsgd.report.run_page import configuration, facts_of, lr_chart


def group_page(
    title: str, families: Sequence[Family], tables: Sequence[str] = (), answers: Sequence[Section] = ()
) -> Page:
    """Return the page of all families, those with the most rows first.

    tables     names of the wanted tables, all by default
    answers    sections before the environment, such as the claims of an experiment
    """
    sections = [section for family in families for section in sections_of(family, tables)]
    runs = [run for family in families for row in family.rows for run in row.runs]
    finished = sum(run.result is not None for run in runs)
    diverged = sum(row.num_diverged for family in families for row in family.rows)
    status = f"{finished} of {len(runs)} runs are finished" + (f", {diverged} diverged" if diverged else "")
    return Page(title, status, [*sections, *answers, *origin(families)])


def sections_of(family: Family, tables: Sequence[str]) -> list[Section]:
    found = tables_of([family], tables)
    if found:
        return list(map(table_section, found))
    labels = family.labels()
    rows = [[label, *our_cells(family, row)] for label, row in zip(labels, family.rows, strict=True)]
    measure = family.rows[0].measure
    heads = ["", *COLUMNS.heads[FIRST_OF_OURS:]]
    heads[3] = f"{measure.short} {measure.unit}".rstrip()
    why = family.without_baseline if len(rows) > 1 and not LAYOUTS.keys().isdisjoint(tables) else ""
    note = " ".join(filter(None, [why, note_of_codes(family.curve_names(), family.rows)]))
    filled = [number for number, column in enumerate(zip(*rows, strict=True)) if any(column)]  # else nothing compares
    heads, *rows = ([cells[number] for number in filled] for cells in (heads, *rows))
    return [Section(family.place, note, heads, rows, curve_charts(family.curve_names(), family.rows))]


def table_section(table: PaperTable) -> Section:
    charts = curve_charts(table.curve_names, table.groups)
    if table.name.startswith("figure1"):
        charts = [batch_chart(table.groups), *charts]
    measure = table.groups[0].measure
    judged = f"A run's {measure.short} is the {measure.how.replace('of last', 'of its last')}."
    match = MEANING if COLUMNS.heads[-1] in table.columns.heads else ""
    note = " ".join(filter(None, [table.measured, judged, match, table.note]))
    return Section(table.title, note, table.columns.with_sides("paper ", "ours "), table.rows, charts)


def curve_charts(names: Sequence[str], rows: Sequence[Group]) -> list[Chart]:
    """Return the charts of the rows' measures and learning rates, up to the last epoch that a run has reached."""
    reached = max(run.epochs_done for row in rows for run in row.shown)
    names = [", ".join([name, *without_result(row)]) for name, row in zip(names, rows, strict=True)]
    charts = [
        Chart(
            f"{curve}, mean ± std (band: 2 std)",
            [band_of(name, row.shown, key) for name, row in zip(names, rows, strict=True)],
            unit,
            xmax=reached,
        )
        for curve, key, unit in curve_keys(rows[0].runs[0])
    ]
    shown = [(name, row.shown[0]) for name, row in zip(names, rows, strict=True)]
    return [*charts, lr_chart(shown, reached)]


def curve_keys(run: LoggedRun) -> list[tuple[str, str, str]]:
    """Return name, key in the log and unit of each of a run's curves over epochs."""
    found = []
    for measure in run.headlines:
        found.append((f"validation {measure.short}", measure.key, measure.unit))
        found += [(f"training {measure.short}", measure.training, measure.unit)] if measure.training else []
    return found


def band_of(name: str, runs: Sequence[LoggedRun], key: str) -> Series:
    """Return the mean over runs per epoch, with ± 2 std if there are several runs."""
    curve = mean_curve(runs, key)
    epochs, means, stds = list(curve), list(curve.values()), std_curve(runs, key).values()
    if len(runs) < 2:
        return Series(name, epochs, means)
    low = [value - 2 * std for value, std in zip(means, stds, strict=True)]
    high = [value + 2 * std for value, std in zip(means, stds, strict=True)]
    return Series(name, epochs, means, low, high)


def by_outcome(rows: Sequence[Group]) -> tuple[list[Group], list[Group], list[Group]]:
    """Return the rows without diverged seeds, those with some, and those whose seeds have all diverged.

    Rows without an outcome yet are left out.
    """
    whole = [row for row in rows if row.spread and row.whole]
    partly = [row for row in rows if row.spread and not row.whole]
    return whole, partly, [row for row in rows if row.lost]


def batch_chart(rows: Sequence[Group]) -> Chart:
    """Return the error over the global batch (Fig. 1). Rows with diverged seeds are separate lines."""
    whole, partly, lost = by_outcome(rows)
    lines = [
        means_of("linear rule, gradual warmup", whole),
        *([replace(means_of("without seeds that diverged", partly), mark="hollow")] if partly else []),
    ]
    if lost:
        batches = [row.global_batch for row in lost]
        lines.append(Series("all seeds diverged", batches, [None] * len(lost), mark="cross"))
    measure = rows[0].measure
    name = f"validation {measure.short} over the global batch"
    return Chart(f"{name}, mean ± std (band: 2 std)", lines, measure.unit, "images per update", logx=True)


def means_of(name: str, rows: Sequence[Group]) -> Series:
    """Return the means of rows over their batch, with ± 2 std if there are several seeds."""
    known = [(row.global_batch, row.spread) for row in rows if row.spread]
    low = [None if spread.std is None else spread.mean - 2 * spread.std for _, spread in known]
    high = [None if spread.std is None else spread.mean + 2 * spread.std for _, spread in known]
    return Series(name, [kn for kn, _ in known], [spread.mean for _, spread in known], low, high)


def origin(families: Sequence[Family]) -> list[Section]:
    """Return configuration and environment of the largest family's baseline, or of its first row if it has none."""
    if not families:
        return []
    family = families[0]
    row = family.baseline or family.rows[0]
    name, header = family.labels()[family.rows.index(row)], row.header
    environment = {key: value for key, value in header.get("environment", {}).items() if key != "started"}
    facts: list[Fact] = facts_of(environment)
    return [
        Section(f"Configuration of the row: {name}", facts=configuration(header)),
        Section("Environment", facts=facts),
    ]
