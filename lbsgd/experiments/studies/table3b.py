"""Table 3b: the linear scaling rule in the detector itself, and without it (Sec. 5.4)."""

from __future__ import annotations

from dataclasses import replace

from lbsgd.experiments.grid import Claim, DataSet, Row, Study, setting
from lbsgd.experiments.studies.table3a import name_of, row_from

BACKBONE = 1  # all rows start from digits18's run at this factor
NOT_SCALED = "lr_not_scaled"


def rows(data: DataSet) -> tuple[Row, ...]:
    fixed = replace(
        row_from(BACKBONE, data.large),
        name=f"{name_of(BACKBONE, data.large)}_{NOT_SCALED}",
        settings=(setting("linear_scaling.rule", "fixed"),),
    )
    return (*(row_from(BACKBONE, factor) for factor in data.factors), fixed)


def claims(data: DataSet) -> tuple[Claim, ...]:
    names = {factor: name_of(BACKBONE, factor) for factor in data.factors}
    large = names[data.large]
    return (
        *(
            Claim(f"{factor} times the batch by the linear rule leaves box AP level", names[factor], "same", names[1])
            for factor in data.factors[1:]
        ),
        Claim("without scaling the learning rate the large batch is worse", f"{large}_{NOT_SCALED}", "worse", large),
    )


STUDY = Study("table3b", "the linear rule in detection", "Table 3b", rows, claims, is_detection=True)
