"""Do updates alone bring the large batch to its baseline? Table 1 for three times the epochs, at its learning rate.

On CIFAR-10 the large batch ends above the baseline at the tuned learning rate (`table1`) and at a quarter of it
(`elbow`), but not at that quarter for three times the epochs (`longer`). One cell is missing: the tuned learning rate
for three times the epochs. Hypothesis: the large batch lacked only updates, so all five claims of Table 1 hold here.
Stated after the results of these three were known, and before any run of this study.

Seeds 3 and 4 of the four rows were added when those of seeds 0 to 2 were known, to reach the paper's five. Hypothesis:
all five claims still hold, and the interval of the first becomes narrower. Stated before any run of these seeds.
"""

from __future__ import annotations

from lbsgd.experiments.grid import DataSet, Row, Study
from lbsgd.experiments.studies import table1
from lbsgd.experiments.studies.longer import TIMES, for_longer


def rows(data: DataSet) -> tuple[Row, ...]:
    return for_longer(table1.rows, data)


STUDY = Study(
    "longer_table1",
    f"warmup, for {TIMES} times the epochs",
    "Table 1",
    rows,
    table1.claims,
    grid="longer_table1",
    table="table1",
)
