"""Does the linear rule hold for a deeper network on photographs? Table 2c for three times the epochs.

At this length the large batch of the data set's own network ends at its baseline's error (`longer_table1`). Learning
rate, warmup and decay are those of that network, so nothing is tuned for the deeper one. Hypothesis: its large batch
ends at its baseline's error, too. Stated after the results of `longer_table1` were known, and before any run of the
deeper network.
"""

from __future__ import annotations

from dataclasses import replace

from lbsgd.experiments.grid import DataSet, Row
from lbsgd.experiments.studies import table2c
from lbsgd.experiments.studies.longer import TIMES, for_longer


def rows(data: DataSet) -> tuple[Row, ...]:
    return for_longer(table2c.rows, data)


STUDY = replace(
    table2c.STUDY,
    name="longer_table2c",
    title=f"a deeper network, for {TIMES} times the epochs",
    rows=rows,
    grid="longer_table2c",
    table="table2c",
)
