"""Do large batches need more updates? Figure 1 from Table 1's large batch on, for three times the epochs.

At a quarter of the learning rate the large batch still ends above its baseline on CIFAR-10 (`elbow`). Its epoch has
48 updates there, and 156 in the paper. Hypothesis: it lacks updates, so with three times as many, and warmup and decay
at the same shares of the run, it ends at the baseline's error. Stated after the results of `elbow` were known, and
before any run of this study.

Larger batches were added after the large batch was known to end at the baseline's error. Hypothesis: twice the large
batch also has enough updates, but the largest batch lacks them. Stated before any of their runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lbsgd.experiments.grid import Claim, DataSet, Row, Study, setting
from lbsgd.experiments.studies import elbow

TIMES = 3


def for_longer(rows: Callable[[DataSet], tuple[Row, ...]], data: DataSet) -> tuple[Row, ...]:
    """Return a study's rows for TIMES the epochs."""
    longer = stretched(data)
    return tuple(stretch(row, longer) for row in rows(longer))


def stretched(data: DataSet) -> DataSet:
    """Return the data set with TIMES the epochs, and with warmup and decay at the same shares of the run."""
    return replace(
        data,
        epochs=TIMES * data.epochs,
        warmup_epochs=TIMES * data.warmup_epochs,
        decay_epochs=tuple(TIMES * epoch for epoch in data.decay_epochs),
    )


def stretch(row: Row, data: DataSet) -> Row:
    """Return the row with the schedule of a stretched data set in place of its JSON's.

    A row that sets its whole warmup already has it from the stretched data set. The baseline has no warmup.
    """
    settings = [setting("epochs", data.epochs), setting("decay.epochs", list(data.decay_epochs))]
    if row.factor > 1 and not any(each.startswith("lbsgd.warmup=") for each in row.settings):
        settings.append(setting("warmup.epochs", data.warmup_epochs))
    return replace(row, settings=(*row.settings, *settings), epochs=data.epochs)


def rows(data: DataSet) -> tuple[Row, ...]:
    compared = replace(data, factors=tuple(each for each in data.factors if each == 1 or each >= data.large))
    return for_longer(elbow.rows, compared)


def claims(data: DataSet) -> tuple[Claim, ...]:
    return (
        *(
            Claim(
                f"with {TIMES} times the epochs a batch {factor} times as large ends at the baseline's error",
                f"x{factor}",
                "same",
                "x1",
            )
            for factor in (data.large, 2 * data.large)
        ),
        Claim(
            f"with {TIMES} times the epochs the largest batch is still worse", f"x{max(data.factors)}", "worse", "x1"
        ),
    )


STUDY = Study(
    "longer",
    f"{TIMES} times the epochs at a quarter of the learning rate",
    "Figures 1 and 3",
    rows,
    claims,
    grid="longer",
    table="figure1",
)
