"""Do updates alone bring the large batch to its baseline? Table 1 for three times the epochs, at its learning rate.

On CIFAR-10 the large batch ends above the baseline at the tuned learning rate (`table1`) and at a quarter of it
(`elbow`), but not at that quarter for three times the epochs (`longer`). One cell is missing: the tuned learning rate
for three times the epochs. Hypothesis: the large batch lacked updates only, so all five claims of Table 1 hold here.
Stated after the results of these three were known, and before any run of this one.
"""

from __future__ import annotations

from lbsgd.experiments.grid import DataSet, Row, Study
from lbsgd.experiments.studies import table1
from lbsgd.experiments.studies.longer import TIMES, stretch, stretched


def rows(data: DataSet) -> tuple[Row, ...]:
    longer = stretched(data)
    *others, gradual = table1.rows(longer)
    return (*(stretch(row, longer, is_gradual=False) for row in others), stretch(gradual, longer, is_gradual=True))


STUDY = Study(
    "longer_table1",
    f"warmup, for {TIMES} times the epochs",
    "Table 1",
    rows,
    table1.claims,
    apart=True,
    table="table1",
)
