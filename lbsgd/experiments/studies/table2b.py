"""Table 2b: γ of the last batch norm of each residual block, 0 or 1 at the start (Sec. 5.1)."""

from __future__ import annotations

from lbsgd.experiments.grid import BASELINE, Claim, DataSet, Row, Study, gradual, setting


def rows(data: DataSet) -> tuple[Row, ...]:
    one = (setting("batch_norm.zero_last_gamma", False),)
    large = data.large
    return (
        Row("x1_gamma_one", 1, one),
        BASELINE,
        Row(f"x{large}_gamma_one", large, one),
        gradual(large),
    )


def claims(data: DataSet) -> tuple[Claim, ...]:
    large = f"x{data.large}"
    return (
        Claim("γ = 1 is worse than γ = 0 at the large batch", f"{large}_gamma_one", "worse", large),
        Claim("γ = 1 is worse than γ = 0 at the baseline", "x1_gamma_one", "worse", "x1"),
    )


STUDY = Study("table2b", "γ of the last batch norm", "Table 2b", rows, claims)
