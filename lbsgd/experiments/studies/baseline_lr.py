"""The choice of the baseline's learning rate, made on the baseline alone before any large batch runs.

The linear rule has no number of its own to tune (Sec. 2.1): what is chosen here holds for all rows.
"""

from __future__ import annotations

from lbsgd.experiments.grid import Claim, DataSet, Row, Study, setting

TIMES = (0.5, 1, 2, 4)  # the data set's base_lr


def rows(data: DataSet) -> tuple[Row, ...]:
    return tuple(
        Row(f"x1_lr_{data.base_lr * times:g}", f"lr {data.base_lr * times:g}", 1, lr_of(data, times)) for times in TIMES
    )


def lr_of(data: DataSet, times: float) -> tuple[str, ...]:
    return (setting("linear_scaling.base_lr", data.base_lr * times),)


def claims(data: DataSet) -> tuple[Claim, ...]:
    return ()  # a choice, no claim


STUDY = Study("baseline_lr", "the choice of the baseline's lr", "Sec. 5.1", rows, claims)
