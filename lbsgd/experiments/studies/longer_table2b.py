"""Does γ = 0 in each block's last batch norm help on photographs? Table 2b for three times the epochs.

On digits neither claim of Table 2b holds, and neither is refuted: 261 images decide no difference as small as the
paper's, 0.24 and 0.37 points. CIFAR-10 has 10,000. The runs are part of the grid of `longer_table1`, and are compared
with its baseline and large batch. Three seeds of these differ such that only a cost of about 0.4 points or more can
show. Hypothesis: both claims of Table 2b hold, γ = 1 costs at least that at both batches. Stated after all other
results on CIFAR-10 were known, and before any run with γ = 1 there.
"""

from __future__ import annotations

from lbsgd.experiments.grid import DataSet, Row, Study
from lbsgd.experiments.studies import longer_table1, table2b
from lbsgd.experiments.studies.longer import TIMES, for_longer


def rows(data: DataSet) -> tuple[Row, ...]:
    return for_longer(table2b.rows, data)


STUDY = Study(
    "longer_table2b",
    f"γ of the last batch norm, for {TIMES} times the epochs",
    "Table 2b",
    rows,
    table2b.claims,
    grid=longer_table1.STUDY.grid,
    table="table2b",
)
