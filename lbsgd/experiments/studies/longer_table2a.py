"""Does the linear rule beat other rules on photographs? Table 2a for three times the epochs.

On digits two of Table 2a's claims fail: the rules lie too close together for 261 images. The runs are part of the grid
of `longer_table1`, and are compared with its baseline and large batch. Hypothesis: all six claims of Table 2a hold.
Stated after the results of `longer_table1` were known, and before any run of another learning rate of this length,
except a quarter of it (`longer`).
"""

from __future__ import annotations

from lbsgd.experiments.grid import DataSet, Row, Study
from lbsgd.experiments.studies import longer_table1, table2a
from lbsgd.experiments.studies.longer import TIMES, for_longer


def rows(data: DataSet) -> tuple[Row, ...]:
    return for_longer(table2a.rows, data)


STUDY = Study(
    "longer_table2a",
    f"learning-rate rules, for {TIMES} times the epochs",
    "Table 2a",
    rows,
    table2a.claims,
    grid=longer_table1.STUDY.grid,
    table="table2a",
)
