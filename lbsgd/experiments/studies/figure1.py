"""Figures 1 and 3: the error over the global batch, by the linear rule with gradual warmup."""

from __future__ import annotations

from lbsgd.experiments.grid import Claim, DataSet, Row, Study, gradual


def rows(data: DataSet) -> tuple[Row, ...]:
    return tuple(gradual(factor) for factor in data.factors)


def claims(data: DataSet) -> tuple[Claim, ...]:
    plateau = [factor for factor in data.factors if 1 < factor <= data.large]
    return (
        *(
            Claim(f"a batch {factor} times as large ends at the baseline's error", f"x{factor}", "same", "x1")
            for factor in plateau
        ),
        Claim("beyond some batch the rule ends: the largest is worse", f"x{max(data.factors)}", "worse", "x1"),
    )


STUDY = Study("figure1", "error over the global batch", "Figures 1 and 3", rows, claims)
