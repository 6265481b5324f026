"""Where does the error begin to rise? Figure 1 with every doubling of the batch, for three times the epochs.

`longer` compares the baseline only with the large batch and larger ones. The batches between them are missing, so its
curve does not show whether the error is level, or rises from the first doubling on. The runs are part of the grid of
`longer`. Hypothesis: every doubling up to the large batch ends at the baseline's error, and the largest batch is worse.
Stated after the results of `longer` were known, and before any run of the batches between.
"""

from __future__ import annotations

from dataclasses import replace

from lbsgd.experiments.grid import Claim, DataSet, Row, Study
from lbsgd.experiments.studies import elbow, figure1, longer


def doubled(data: DataSet) -> DataSet:
    """Return the data set with every power of two up to the large batch among its factors."""
    doublings = {2**times for times in range(data.large.bit_length())}
    return replace(data, factors=tuple(sorted({*doublings, *data.factors})))


def rows(data: DataSet) -> tuple[Row, ...]:
    return longer.for_longer(elbow.rows, doubled(data))


def claims(data: DataSet) -> tuple[Claim, ...]:
    return figure1.claims(doubled(data))


STUDY = Study(
    "longer_figure1",
    f"error over the global batch, for {longer.TIMES} times the epochs",
    "Figures 1 and 3",
    rows,
    claims,
    grid=longer.STUDY.grid,
    table="figure1",
)
