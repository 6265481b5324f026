"""Table 1: the baseline against a large batch with no, constant and gradual warmup (Sec. 2.2, 5.1)."""

from __future__ import annotations

from lbsgd.experiments.grid import BASELINE, Claim, DataSet, Row, Study, gradual, setting


def rows(data: DataSet) -> tuple[Row, ...]:
    large = data.large
    constant = {"kind": "constant", "epochs": data.warmup_epochs}
    none = {"kind": "none", "epochs": 0}
    return (
        BASELINE,
        Row(f"x{large}_no_warmup", large, (setting("warmup", none),)),
        Row(f"x{large}_constant_warmup", large, (setting("warmup", constant),)),
        gradual(large),
    )


def claims(data: DataSet) -> tuple[Claim, ...]:
    large = f"x{data.large}"
    return (
        Claim("with gradual warmup the large batch reaches the baseline's error", large, "same", "x1"),
        Claim("without warmup the large batch is worse than the baseline", f"{large}_no_warmup", "worse", "x1"),
        Claim("with constant warmup it is worse than the baseline", f"{large}_constant_warmup", "worse", "x1"),
        Claim("no warmup is worse than gradual warmup", f"{large}_no_warmup", "worse", large),
        Claim("constant warmup is worse than gradual warmup", f"{large}_constant_warmup", "worse", large),
    )


STUDY = Study("table1", "warmup", "Table 1", rows, claims)
