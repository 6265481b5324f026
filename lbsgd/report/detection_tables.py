"""Table 3: box and mask AP of detectors, by the global batch of their pre-training (a) and by their own (b)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lbsgd.algorithm.published import DETECTOR_AP, PRE_TRAINING_AP
from lbsgd.report.families import Family
from lbsgd.report.groups import Group
from lbsgd.report.measure import MASK_AP
from lbsgd.report.paper_table import Columns, PaperTable, difference_cell, error_cell
from lbsgd.report.statistics import spread

COLUMNS = Columns(
    heads=("", "kn", "box AP", "mask AP", "kn", "η", "box AP", "mask AP", "seeds", "difference [95 %]"),
    narrow=(0, 2, 4, 6, 9),
    measured_on="Mask R-CNN with ResNet-50 on COCO",
)
BASE = 256  # global batch of the paper's baseline


def detection_tables(family: Family) -> list[PaperTable]:
    """Return Table 3a, rows that differ only in their backbone, and Table 3b, rows that share a backbone.

    If several kn (3a) or backbones (3b) are possible, the one with the most rows is taken.
    """
    unchanged = [row for row in family.rows if not changes_of(family, row)]
    own = most_common([row.global_batch for row in unchanged])
    pre_trained = sorted((row for row in unchanged if row.global_batch == own and backbone_kn(row)), key=backbone_kn)
    backbone = most_common([started_from(row) for row in family.rows])
    trained = [row for row in family.rows if started_from(row) == backbone]
    trained.sort(key=lambda row: (row.global_batch, changes_of(family, row)))
    tables = [
        table("table3a", "Table 3a, kn of the pre-training", family, pre_trained, pre_training(pre_trained)),
        table("table3b", "Table 3b, kn of the detector", family, trained, detector(family, trained)),
    ]
    return [each for each in tables if len(each.rows) > 1]


def changes_of(family: Family, row: Group) -> list[str]:
    """Return a row's changes except its backbone, by which the rows of Table 3a differ."""
    return sorted(change for change in family.changes_of(row) if not change.startswith("from "))


def most_common(values: Sequence) -> object:
    return Counter(values).most_common(1)[0][0] if values else None


def started_from(row: Group) -> str:
    """Return the weights that a run began with as the log describes them, such as `resnet18, kn = 256`."""
    return row.header.get("started_from") or ""


def backbone_kn(row: Group) -> int:
    """Return the global batch of the pre-training; 0 if the log does not give it."""
    found = re.search(r"kn = (\d+)", started_from(row))
    return int(found[1]) if found else 0


class Name(NamedTuple):
    """A row's name and kn, the paper's kn of the same row, and the paper's box and mask AP by kn."""

    label: str
    kn: int
    paper_kn: int
    papers: Mapping[int, tuple[float, float]]


def pre_training(rows: Sequence[Group]) -> list[Name]:
    """Name the rows by their factor; the paper's row is the one with the same factor."""
    factors = [backbone_kn(row) / backbone_kn(rows[0]) for row in rows]
    return [
        Name(f"x{factor:g}", backbone_kn(row), round(BASE * factor), PRE_TRAINING_AP)
        for row, factor in zip(rows, factors, strict=True)
    ]


def detector(family: Family, rows: Sequence[Group]) -> list[Name]:
    """Name the rows by their factor; the paper's row is the one with the same kn, by the linear rule."""
    names = []
    for row in rows:
        kn, changes = row.global_batch, changes_of(family, row)
        label = ", ".join([f"x{kn / rows[0].global_batch:g}", *changes])
        names.append(Name(label, kn, kn, {} if changes else DETECTOR_AP))
    return names


def table(key: str, title: str, family: Family, rows: Sequence[Group], names: Sequence[Name]) -> PaperTable:
    """Fill in the cells; the others are compared with the first row."""
    cells = tuple(
        (name.label, *paper_cells(name), f"{name.kn:,}", *our_cells(row, rows[0]))
        for row, name in zip(rows, names, strict=True)
    )
    return PaperTable(key, title, family.place, COLUMNS, cells, tuple(rows))


def paper_cells(name: Name) -> tuple[str, ...]:
    ap = name.papers.get(name.paper_kn)
    return ("-", "-", "-") if ap is None else (f"{name.paper_kn:,}", *(f"{value:.1f}" for value in ap))


def our_cells(row: Group, first: Group) -> tuple[str, ...]:
    mask = spread(row.values_of(MASK_AP))
    return f"{row.lr:.3g}", error_cell(row), str(mask or "-"), str(len(row.runs)), difference_cell(row, first)
