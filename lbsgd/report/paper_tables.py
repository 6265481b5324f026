"""Tables 1, 2a, 2b, 2c and the numbers of Figures 1 and 3: the paper's errors next to ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lbsgd.algorithm import published as paper
from lbsgd.report.detection_tables import detection_tables
from lbsgd.report.families import Family
from lbsgd.report.groups import Group
from lbsgd.report.match import matched_from
from lbsgd.report.measure import BOX_AP, TOP1
from lbsgd.report.paper_table import Columns, PaperTable, difference_cell, error_cell

BASE, LARGE = 256, 8192  # the paper's global batches
DEEPER = ("resnet101", "resnet14")  # the networks of Table 2c: the paper's, and our small one
COLUMNS = Columns(
    heads=("", "kn", "η", "error %", "kn", "η", "error %", "seeds", "difference [95 %]", "curves match"),
    narrow=(0, 3, 4, 6, 8),
    measured_on="ResNet-50 on ImageNet",
)

MEASURED = {
    "no warmup": paper.NO_WARMUP,
    "constant warmup": paper.CONSTANT_WARMUP,
    "half the lr": paper.HALF_LR,
    "twice the lr": paper.DOUBLE_LR,
    "lr not scaled": paper.FIXED_LR,
    "square-root rule": paper.SQRT_RULE,
    "γ = 1": paper.GAMMA_ONE,
}


class PaperRow(NamedTuple):
    """A row of a table of the paper: the small or the large batch, with one change or none."""

    large: bool
    change: str = ""


LAYOUTS = {
    "table1": (
        "Table 1, warmup",
        (PaperRow(False), *(PaperRow(True, c) for c in ("no warmup", "constant warmup", ""))),
    ),
    "table2a": (
        "Table 2a, learning-rate rules",
        (
            *(PaperRow(False, change) for change in ("half the lr", "", "twice the lr")),
            *(PaperRow(True, c) for c in ("half the lr", "", "twice the lr", "lr not scaled", "square-root rule")),
        ),
    ),
    "table2b": (
        "Table 2b, γ of each block's last batch norm",
        tuple(PaperRow(large, change) for large in (False, True) for change in ("γ = 1", "")),
    ),
}

# The rows that a table needs, for the error if the runs do not make a wanted table.
NEEDS = {
    **{
        name: f"the baseline and a row with {' or '.join(dict.fromkeys(row.change for row in layout if row.change))}"
        for name, (_, layout) in LAYOUTS.items()
    },
    "table2c": f"a {' or a '.join(DEEPER)} with two global batches",
    "figure1": "a network with two global batches",
    "table3a": "detectors with two backbones",
    "table3b": "detectors with two global batches",
}


def paper_tables(family: Family) -> list[PaperTable]:
    """Return the tables for which a family has at least two rows, one per large batch.

    Detectors make Table 3. Other runs that are not judged by their top-1 error make no table. Tables 1 and 2 compare
    with the baseline, so runs without a baseline, such as the simulated ones of other experiments, make neither.
    """
    if family.rows[0].measure.key == BOX_AP.key:
        return detection_tables(family)
    if family.rows[0].measure.key != TOP1.key:
        return []
    tables: list[PaperTable] = []
    for name, (title, layout) in LAYOUTS.items():
        changes = {row.change for row in layout if row.change}
        factors: list[float | None] = [*family.factors(*changes)] or [None]
        for factor in factors:
            rows = [(find(family, asked, factor), asked) for asked in layout]
            if family.baseline and any(asked.change and row for row, asked in rows):
                own = name_at(name, factor, factors)
                tables.append(filled(family, own, title, [(row, papers(asked)) for row, asked in rows]))
    if family.rows[0].header["model"] in DEEPER:
        tables += tables_2c(family)
    else:
        plain = [row for row in family.rows if not family.changes_of(row)]
        known = [(row, (kn_of(row), paper.ERROR_PCT.get(kn_of(row)))) for row in plain]
        tables.append(filled(family, "figure1", "Figures 1 and 3, error over the global batch", known))
    return [table for table in tables if len(table.rows) > 1]


def tables_2c(family: Family) -> list[PaperTable]:
    """Return Table 2c for each large batch: the baseline and that batch."""
    columns, factors = COLUMNS._replace(measured_on="ResNet-101 on ImageNet"), family.factors("")
    rows_at = ((PaperRow(False), BASE), (PaperRow(True), LARGE))
    return [
        filled(
            family,
            name_at("table2c", factor, factors),
            "Table 2c, a deeper network",
            [(find(family, asked, factor), (kn, paper.RESNET_101[kn])) for asked, kn in rows_at],
            columns,
        )
        for factor in factors
    ]


def name_at(name: str, factor: float | None, factors: Sequence[float | None]) -> str:
    """Return the table's name, with the factor if there are several large batches."""
    return f"{name}_x{factor:g}" if len(factors) > 1 and factor else name


def tables_of(families: Sequence[Family], names: Sequence[str] = ()) -> list[PaperTable]:
    """Return the families' tables with these names, by default all. `table1` stands for `table1_x8` and the like."""
    return [table for family in families for table in paper_tables(family) if not names or name_of(table) in names]


def name_of(table: PaperTable) -> str:
    return table.name.split("_x")[0]


def why_not(families: Sequence[Family], names: Sequence[str]) -> list[str]:
    """Say for each of these tables that no family makes which rows it needs, and what is wrong if that is known."""
    made = set(map(name_of, tables_of(families)))
    lacks = lacking(families)
    return [
        f"no {name} can be made of these runs: it takes {NEEDS[name]}"
        + (f". {lacks}" if lacks and name in LAYOUTS else "")
        for name in dict.fromkeys(names)
        if name not in made
    ]


def lacking(families: Sequence[Family]) -> str:
    """Say why families of several rows have no baseline, if any lack one."""
    without = dict.fromkeys(family.without_baseline for family in families if len(family.rows) > 1)
    return " ".join(filter(None, without)).rstrip(".")


def find(family: Family, asked: PaperRow, factor: float | None) -> Group | None:
    if asked.large and factor is None:
        return None
    return family.find(factor if asked.large and factor else 1, *filter(None, [asked.change]))


def kn_of(row: Group) -> int:
    """Return the paper's global batch of the same factor."""
    return round(BASE * row.factor)


def papers(asked: PaperRow) -> tuple[int, tuple[float, float] | None]:
    """Return the paper's global batch and error of a row."""
    kn = LARGE if asked.large else BASE
    return kn, MEASURED.get(asked.change, paper.ERROR_PCT).get(kn)


def filled(
    family: Family, name: str, title: str, rows: Iterable[tuple[Group | None, tuple]], columns: Columns = COLUMNS
) -> PaperTable:
    """Fill in the cells. Rows without runs are left out."""
    there = [(row, *known) for row, known in rows if row is not None]
    cells = tuple(
        (family.label(row), *paper_cells(kn, error, row, family), *our_cells(family, row)) for row, kn, error in there
    )
    return PaperTable(name, title, family.place, columns, cells, tuple(row for row, *_ in there))


def paper_cells(kn: int, error: tuple[float, float] | None, row: Group, family: Family) -> tuple[str, str, str]:
    """Return the paper's kn, η (by the same rule as ours) and error."""
    if error is None:
        return "-", "-", "-"
    assert family.base_lr  # it is None only for candidates, which are in no table
    times = row.lr / (family.base_lr * row.factor)
    rule = {"lr not scaled": 0.1, "square-root rule": 0.1 * (kn / BASE) ** 0.5}
    lr = next((rule[change] for change in family.changes_of(row) if change in rule), 0.1 * kn / BASE * times)
    return f"{kn:,}", f"{lr:.3g}", "{:.2f} ± {:.2f}".format(*error)


def our_cells(family: Family, row: Group) -> tuple[str, ...]:
    baseline = family.baseline
    matched = "" if baseline is None or row is baseline else matched_from(row, baseline).words
    return (
        f"{row.global_batch:,}",
        f"{row.lr:.3g}",
        error_cell(row),
        str(len(row.runs)),
        difference_cell(row, baseline),
        matched,
    )
