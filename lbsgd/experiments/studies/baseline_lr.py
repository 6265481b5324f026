"""The choice of the baseline's learning rate, made on the baseline alone before any large batch runs.

The linear rule has no number to tune (Sec. 2.1), so the learning rate chosen here holds for all rows.
"""

from __future__ import annotations

from lbsgd.experiments.grid import Claim, DataSet, Row, Study, setting
from lbsgd.report.groups import Group
from lbsgd.report.page import Section


def rows(data: DataSet) -> tuple[Row, ...]:
    return tuple(Row(f"x1_lr_{lr:g}", 1, (setting("linear_scaling.base_lr", lr),)) for lr in data.candidate_lrs)


def claims(data: DataSet) -> tuple[Claim, ...]:
    return ()  # a choice is no claim


def sections(data: DataSet, groups: dict[str, Group]) -> list[Section]:
    """Say which learning rate these runs choose, and whether the data set has another."""
    errors = {row.base_lr: row.spread.mean for row in groups.values() if row.spread and row.whole}
    if not errors:
        return []
    chosen = max(lr for lr, error in errors.items() if error <= min(errors.values()) + data.margin_pct)
    rule = f"the largest whose error is within the margin of ±{data.margin_pct:g} of the best"
    others = "" if chosen == data.base_lr else f" The other experiments have {data.base_lr:g}."
    return [Section("Choice", f"By these runs the baseline's learning rate is {chosen:g}: {rule}.{others}")]


STUDY = Study("baseline_lr", "the choice of the baseline's lr", "Sec. 5.1", rows, claims, sections, grid="baseline_lr")
