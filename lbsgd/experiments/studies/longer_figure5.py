"""Do curves at other learning rates fail to match, as in Figure 5? For three times the epochs.

The paper's Figure 5: training curves of one small batch at two learning rates do not match, although both end at about
the same error, whereas those of small and large batches do match by the linear rule. The runs are part of the grid of
`longer_table1`, and are compared with its baseline and large batch. The distance of a run's curve is that of its
training error from the baseline's mean, on average over the epochs after the first third (`match.distances`).

Hypothesis: runs at half and twice the baseline's learning rate end at its error, and their curves lie farther from the
baseline's than the large batch's curve does. Stated before any run at these two rates. The large batch was known: its
seeds are 0.68, 0.30 and 0.25 points away. So the last two claims need curves clearly more than half a point away.
"""

from __future__ import annotations

from lbsgd.experiments.grid import Claim, DataSet, Row, Study
from lbsgd.experiments.studies import longer_table1, longer_table2a
from lbsgd.experiments.studies.longer import TIMES
from lbsgd.report.groups import Group
from lbsgd.report.match import distances
from lbsgd.report.page import Section
from lbsgd.report.statistics import spread

RATES = {"x1_half_lr": "half", "x1_double_lr": "twice"}


def rows(data: DataSet) -> tuple[Row, ...]:
    return tuple(row for row in longer_table2a.rows(data) if row.name in ("x1", f"x{data.large}", *RATES))


def claims(data: DataSet) -> tuple[Claim, ...]:
    large = f"x{data.large}"
    return (
        *(
            Claim(f"with {rate} the learning rate the small batch ends at the baseline's error", name, "same", "x1")
            for name, rate in RATES.items()
        ),
        *(
            Claim(
                f"the curve of {rate} the learning rate lies farther from the baseline's than that of the large batch",
                name,
                "worse",
                large,
                curves_from="x1",
            )
            for name, rate in RATES.items()
        ),
    )


def sections(data: DataSet, groups: dict[str, Group]) -> list[Section]:
    """Return how far each row's training curve lies from the baseline's, in the claims' epochs and in all epochs."""
    baseline = groups.get("x1")
    if baseline is None:
        return []
    cells = []
    for name, group in groups.items():
        if group is not baseline:
            counted, all_epochs = distances(group, baseline), distances(group, baseline, left_out=0)
            cells.append([name, str(spread(counted) or "-"), str(spread(all_epochs) or "-"), str(len(counted))])
    note = "mean distance from the baseline's mean training error, in points; the claims leave the first third out"
    heads = ("row", "epochs after the first third", "all epochs", "seeds")
    return [Section("Distance of the training curves", note, heads, cells)]


STUDY = Study(
    "longer_figure5",
    f"other learning rates, for {TIMES} times the epochs",
    "Figure 5",
    rows,
    claims,
    sections,
    grid=longer_table1.STUDY.grid,
    table="table2a",
)
