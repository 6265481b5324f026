"""Does the linear rule end at a batch or at a learning rate? Figure 1 at a quarter of the baseline's learning rate.

The baseline's learning rate is the largest that was tried, so the rule soon reaches rates at which perhaps no batch
trains. Hypothesis: the learning rate kη ends the rule, so a quarter of η takes it to four times the batch. Stated
after Figure 1 was known at η, and before any run of this study.
"""

from __future__ import annotations

from dataclasses import replace

from lbsgd.experiments.grid import Claim, DataSet, Row, Study, gradual, setting

SHARE = 1 / 4


def rows(data: DataSet) -> tuple[Row, ...]:
    lower = setting("linear_scaling.base_lr", SHARE * data.base_lr)
    return tuple(replace(gradual(factor), settings=(lower,)) for factor in data.factors)


def claims(data: DataSet) -> tuple[Claim, ...]:
    return tuple(
        Claim(
            f"at a quarter of the lr a batch {factor} times as large ends at the baseline's error",
            f"x{factor}",
            "same",
            "x1",
        )
        for factor in data.factors
        if 1 < factor <= data.large / SHARE
    )


STUDY = Study(
    "elbow", "at a quarter of the learning rate", "Figures 1 and 3", rows, claims, grid="elbow", table="figure1"
)
