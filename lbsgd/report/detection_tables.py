"""Table 3: box and mask AP of detectors, by the global batch of their pre-training (a) and by their own (b)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from lbsgd.algorithm.published import DETECTOR_AP, PRE_TRAINING_AP
from lbsgd.report.groups import Family, Group, scaling_of
from lbsgd.report.measure import BOX_AP, MASK_AP
from lbsgd.report.paper_table import Columns, PaperTable, error_cell, place_of
from lbsgd.report.statistics import difference, spread

COLUMNS = Columns(
    heads=("", "kn", "box AP", "mask AP", "kn", "η", "box AP", "mask AP", "seeds", "difference [95 %]"),
    narrow=(0, 2, 4, 6, 9),
    measured_on="Mask R-CNN with ResNet-50 on COCO",
)
NOT_SCALED = ", lr not scaled"
BASE = 256  # global batch of the paper's baseline


def detection_tables(family: Family) -> list[PaperTable]:
    """Return Table 3a of the rows that differ in their backbone alone, and 3b of those that have one backbone.

    Where several kn or backbones make such a table, it is of those with the most rows.
    """
    scaled = [row for row in family.rows if scaling_of(row.recipe)["rule"] == "linear"]
    own = most_common([row.global_batch for row in scaled])
    pre_trained = sorted((row for row in scaled if row.global_batch == own and backbone_kn(row)), key=backbone_kn)
    backbone = most_common([started_from(row) for row in family.rows])
    trained = [row for row in family.rows if started_from(row) == backbone]
    trained.sort(key=lambda row: (row.global_batch, row not in scaled))
    tables = [
        table("table3a", "Table 3a, kn of the pre-training", family, pre_trained, pre_training(pre_trained)),
        table("table3b", "Table 3b, kn of the detector", family, trained, detector(trained)),
    ]
    return [each for each in tables if len(each.rows) > 1]


def most_common(values: Sequence) -> object:
    return Counter(values).most_common(1)[0][0] if values else None


def started_from(row: Group) -> str:
    """Return what the log says of the weights that a run began with, such as `resnet18, kn = 256`."""
    return row.header.get("started_from") or ""


def backbone_kn(row: Group) -> int:
    """Return the global batch of the pre-training; 0 where the log does not know it."""
    found = re.search(r"kn = ([\d,]+)", started_from(row))
    return int(found[1].replace(",", "")) if found else 0


Names = list[
    tuple[str, int, int, Mapping[int, tuple[float, float]]]
]  # of each row: its name, ours, the paper's kn and AP


def pre_training(rows: Sequence[Group]) -> Names:
    """Return the rows by their factor; the paper's are those of the same factor."""
    factors = [backbone_kn(row) / backbone_kn(rows[0]) for row in rows]
    return [
        (f"x{factor:g}", backbone_kn(row), round(BASE * factor), PRE_TRAINING_AP)
        for row, factor in zip(rows, factors, strict=True)
    ]


def detector(rows: Sequence[Group]) -> Names:
    """Return the rows by their factor; the paper's are those of the same kn, all by the linear rule."""
    names: Names = []
    for row in rows:
        kn, is_scaled = row.global_batch, scaling_of(row.recipe)["rule"] == "linear"
        name = f"x{kn / rows[0].global_batch:g}{'' if is_scaled else NOT_SCALED}"
        names.append((name, kn, kn, DETECTOR_AP if is_scaled else {}))
    return names


def table(name: str, title: str, family: Family, rows: Sequence[Group], names: Names) -> PaperTable:
    """Fill in the cells; the first row is the one that the others are compared with."""
    cells = tuple(
        (label, *paper_cells(papers.get(paper_kn), paper_kn), f"{kn:,}", *our_cells(row, rows[0]))
        for row, (label, kn, paper_kn, papers) in zip(rows, names, strict=True)
    )
    return PaperTable(name, title, place_of(family), COLUMNS, cells, tuple(rows))


def paper_cells(ap: tuple[float, float] | None, kn: int) -> tuple[str, ...]:
    return ("-", "-", "-") if ap is None else (f"{kn:,}", *(f"{value:.1f}" for value in ap))


def our_cells(row: Group, first: Group) -> tuple[str, ...]:
    mask = spread(row.values_of(MASK_AP))
    apart = None if row is first else difference(row.values_of(BOX_AP), first.values_of(BOX_AP))
    return (f"{row.lr:.3g}", error_cell(row), str(mask or "-"), str(len(row.runs)), str(apart or ""))
