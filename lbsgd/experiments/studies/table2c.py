"""Table 2c: the linear rule holds for a deeper network with the learning rate of the shallower one (Sec. 5.2).

The paper has ResNet-101 in place of ResNet-50; we have 14 layers in place of 8. Learning rate, epochs and decay are
those of the data set, chosen for its own network, so nothing is tuned for the deeper one. Hypothesis: the large batch
ends at the baseline's error. Stated before any run.
"""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter

from lbsgd.experiments.grid import Claim, DataSet, Row, Study, gradual


def rows(data: DataSet) -> tuple[Row, ...]:
    if not data.deeper:
        return ()
    return tuple(
        replace(gradual(factor), name=f"x{factor}_deeper", script=data.deeper.recipe) for factor in (1, data.large)
    )


def claims(data: DataSet) -> tuple[Claim, ...]:
    return (
        Claim(
            "the large batch of a deeper network ends at its baseline's error",
            f"x{data.large}_deeper",
            "same",
            "x1_deeper",
        ),
    )


STUDY = Study("table2c", "a deeper network", "Table 2c", rows, claims, grid="table2c", place=attrgetter("deeper.place"))
