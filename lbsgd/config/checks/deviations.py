"""Intents that the paper measured as worse, or gives a reason against: findings that say how many points they cost.

They are warnings, also in ds_configs/ablations, which exist to have one each; `lbsgd check --fix` leaves them alone, for they
are what somebody asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from lbsgd.algorithm import published as paper
from lbsgd.config.checks.consistency import Finding, explicit_numbers
from lbsgd.config.schema import Recipe


class Deviation(NamedTuple):
    """What is not the paper's, where the paper says so, and its errors by global batch, or the points, if it has any."""

    code: str
    key: str
    message: str
    fix: str
    source: str
    measured: dict | float | None = None


def deviation_findings(config: dict, recipe: Recipe) -> Iterator[Finding]:
    """One finding for each thing that is not the paper's recipe; points are those of ResNet-50 on ImageNet."""
    kn = config["train_batch_size"]
    for code, key, message, fix, source, measured in (*scaling_deviations(kn, recipe), *other_deviations(recipe)):
        points = paper.points_lost(measured, kn) if isinstance(measured, dict) else measured
        said = f"{message}; the paper lost {points:g} points so" if points else message
        yield Finding(code, key, f"{said} ({source})", f"{fix} unless you compare", "warning", points)


def scaling_deviations(kn: int, recipe: Recipe) -> Iterator[Deviation]:
    """Learning rate and warmup."""
    scaling, kind = recipe.linear_scaling, recipe.warmup.kind
    above = kn > scaling.base_batch
    rises = explicit_numbers(recipe, kn, recipe.num_images)["optimizer.params.lr"] > scaling.base_lr
    if above and kind == "none" and rises:
        yield Deviation(
            "R04",
            "lbsgd.warmup.kind",
            f"is none for {kn} images, {kn / scaling.base_batch:g} times base_batch",
            'use "gradual"',
            "Table 1",
            paper.NO_WARMUP,
        )
    if above and kind == "constant":
        yield Deviation(
            "R07",
            "lbsgd.warmup.kind",
            "is constant, and the jump to the full learning rate undoes it",
            'use "gradual"',
            "Table 1",
            paper.CONSTANT_WARMUP,
        )
    if above and scaling.rule != "linear":
        yield Deviation(
            "R08",
            "lbsgd.linear_scaling.rule",
            f"is {scaling.rule}, too small a learning rate for {kn} images",
            'use "linear"',
            "Table 2a",
            paper.SQRT_RULE if scaling.rule == "sqrt" else paper.FIXED_LR,
        )
    factor = scaling.base_lr / scaling.base_batch / (0.1 / 256)
    if recipe.num_images > 10**6 and not 0.51 < factor < 1.99:  # on other data another lr may well be right
        yield Deviation(
            "R09",
            "lbsgd.linear_scaling.base_lr",
            f"is {scaling.base_lr:g} for {scaling.base_batch} images, {factor:g} times the paper's",
            "use 0.1 for 256 images",
            "Table 2a",
            paper.HALF_LR if factor < 1 else paper.DOUBLE_LR,
        )
    if points := paper.points_lost_to_size(kn):
        yield Deviation(
            "R20",
            "train_batch_size",
            f"is {kn}, beyond the {paper.LARGEST_GOOD_BATCH} up to which the linear rule matches the baseline",
            f"use {paper.LARGEST_GOOD_BATCH} or fewer",
            "Fig. 1",
            points,
        )


def other_deviations(recipe: Recipe) -> Iterator[Deviation]:
    """Batch norm, momentum and weight decay."""
    norm, momentum, decay = recipe.batch_norm, recipe.momentum, recipe.weight_decay
    if not norm.zero_last_gamma:
        yield Deviation(
            "R13",
            "lbsgd.batch_norm.zero_last_gamma",
            "is false, so blocks do not begin as the identity",
            "use true",
            "Table 2b",
            paper.GAMMA_ONE,
        )
    if norm.scope == "all":
        yield Deviation(
            "R14",
            "lbsgd.batch_norm.scope",
            "is all, and statistics over all processes make another loss function, which depends on their number",
            'use "worker"',
            "Sec. 2.3",
        )
    if not momentum.correction:
        yield Deviation(
            "R15",
            "lbsgd.momentum.correction",
            "is false, and the old momentum is too small while the learning rate rises",
            "use true",
            "Remark 2",
        )
    if decay.scaling != "none":
        yield Deviation(
            "R16",
            "lbsgd.weight_decay.scaling",
            f"is {decay.scaling}, which scaling the loss in place of the learning rate amounts to",
            'use "none"',
            "Remark 1",
        )
    if decay.on_batch_norm:
        yield Deviation(
            "R17",
            "lbsgd.weight_decay.on_batch_norm",
            "is true, and gamma and beta shrink, too",
            "use false",
            "Sec. 5.1",
        )
