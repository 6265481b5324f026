"""Table 2a: learning rates at half and twice the reference, the square-root rule, and no scaling at all."""

from __future__ import annotations

from lbsgd.experiments.grid import BASELINE, Claim, DataSet, Row, Study, gradual, setting


def rows(data: DataSet) -> tuple[Row, ...]:
    half, double = (setting("linear_scaling.base_lr", data.base_lr * times) for times in (0.5, 2))
    fixed = (setting("linear_scaling.rule", "fixed"), setting("warmup", {"kind": "none", "epochs": 0}))
    large = f"x{data.large}"
    return (
        Row("x1_half_lr", 1, (half,)),
        BASELINE,
        Row("x1_double_lr", 1, (double,)),
        Row(f"{large}_half_lr", data.large, (half,)),
        gradual(data.large),
        Row(f"{large}_double_lr", data.large, (double,)),
        Row(f"{large}_fixed_lr", data.large, fixed),
        Row(f"{large}_sqrt_lr", data.large, (setting("linear_scaling.rule", "sqrt"),)),
    )


def claims(data: DataSet) -> tuple[Claim, ...]:
    large = f"x{data.large}"
    return (
        Claim("the linear rule's lr is no worse than half of it", large, "no worse", f"{large}_half_lr"),
        Claim("the linear rule's lr is no worse than twice of it", large, "no worse", f"{large}_double_lr"),
        Claim("the baseline's lr is no worse than half of it", "x1", "no worse", "x1_half_lr"),
        Claim("the baseline's lr is no worse than twice of it", "x1", "no worse", "x1_double_lr"),
        Claim("an lr that is not scaled is worse than the linear rule", f"{large}_fixed_lr", "worse", large),
        Claim("the square-root rule is worse than the linear rule", f"{large}_sqrt_lr", "worse", large),
    )


STUDY = Study("table2a", "learning-rate rules", "Table 2a", rows, claims)
