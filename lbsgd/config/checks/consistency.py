"""The rules that a DeepSpeed JSON must satisfy, as findings.

A finding says where (key path), what, and the way out. `Plan` raises the errors; the warnings are printed. Here are the
rules that compare DeepSpeed's blocks with the intent in the `lbsgd` block, and those that ask whether the run fits its
processes and its data. traps.py has the rules for DeepSpeed's blocks by themselves, deviations.py those for intents that the
paper measured as worse, foreign.py those for JSONs without an `lbsgd` block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lbsgd.algorithm import published as paper
from lbsgd.algorithm.schedule import scaled_lr
from lbsgd.config.schema import Recipe


class DELETE:
    """Stands in a correction for the value of a key that should go."""


@dataclass(frozen=True)
class Finding:
    """One thing in a JSON that is wrong (severity error), doubtful (warning) or to know (note)."""

    code: str
    key: str
    message: str
    fix: str
    severity: str = "error"
    points: float | None = None  # of top-1 error that the paper lost so
    correction: dict[str, Any] | None = None  # values by key path, DELETE for none, where a program can mend it

    def __str__(self) -> str:
        return f"{self.key}: {self.message}; {self.fix} [{self.code}]"


def get(config: Any, key: str, default: Any = None) -> Any:
    """Value at a dotted key path such as `optimizer.params.lr`, or the default where the path breaks off."""
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return default
        config = config[part]
    return config


def enabled(config: dict, block: str) -> bool:
    """Whether a precision block such as fp16 is switched on."""
    return get(config, f"{block}.enabled", False) is True


# --- the explicit numbers against the intent ----------------------------------------------------------------------------


def iterations_per_epoch(num_images: int, global_batch: int) -> int:
    """⌊N/kn⌋: the remainder of each epoch's permutation is left out."""
    return num_images // global_batch


def explicit_numbers(recipe: Recipe, global_batch: int, num_images: int) -> dict[str, float]:
    """What must stand in DeepSpeed's blocks for this recipe, global batch and data, by key path.

    Gradual warmup is told to WarmupLR in full. Constant and no warmup cannot be; plain DeepSpeed then holds η.
    """
    scaling = recipe.linear_scaling
    reference = scaled_lr(global_batch, scaling.base_lr, scaling.base_batch, scaling.rule)
    warmup = round(recipe.warmup.epochs * iterations_per_epoch(num_images, global_batch))
    numbers = {
        "optimizer.params.lr": reference,
        "scheduler.params.warmup_min_lr": scaling.base_lr if recipe.warmup.kind == "gradual" else reference,
        "scheduler.params.warmup_max_lr": reference,
        "scheduler.params.warmup_num_steps": max(1, warmup),
    }
    if recipe.weight_decay.scaling == "inverse_lr":
        numbers["optimizer.params.weight_decay"] = recipe.weight_decay.base * scaling.base_lr / reference
    return numbers


def tidy(number: float) -> float:
    """A derived number as a person would write it: 4.8, not 4.800000000000001."""
    return number if isinstance(number, int) else float(f"{number:.12g}")


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number to calculate with: no boolean, no NaN, nothing beyond floats."""
    return type(value) in (int, float) and -1e300 < value < 1e300


def recipe_findings(config: dict, recipe: Recipe) -> Iterator[Finding]:
    """Where DeepSpeed's blocks say another thing than the `lbsgd` block; both numbers are in the message."""
    kn, n = config["train_batch_size"], recipe.batch_norm.per_worker_batch
    for key, number in explicit_numbers(recipe, kn, recipe.num_images).items():
        value = get(config, key)
        if not is_number(value) or not math.isclose(value, number, rel_tol=1e-6):
            cost = paper.points_of_lr(kn, value) if key == "optimizer.params.lr" and is_number(value) else None
            lost = f"; the paper lost {cost[0]:g} points with that (Table 2a, {cost[1]})" if cost else ""
            yield Finding(
                "R01",
                key,
                f"is {value!r}, but the lbsgd block makes it {number:.10g} for a global batch of "
                f"{kn} of {recipe.num_images} images{lost}",
                f"set it to {number:.10g}",
                points=cost[0] if cost else None,
                correction={key: tidy(number)},
            )
    yield from warmup_findings(config, recipe)
    for key in ("momentum", "weight_decay"):
        value = get(config, f"optimizer.params.{key}")
        if not is_number(value) or value < 0:
            yield Finding(
                "R05",
                f"optimizer.params.{key}",
                f"is {value!r}",
                "give it as a number (the paper's: momentum 0.9, weight_decay 0.0001)",
            )
    nesterov = get(config, "optimizer.params.nesterov")
    if type(nesterov) is not bool:
        yield Finding("R06", "optimizer.params.nesterov", f"is {nesterov!r}", "write true (the paper's) or false")


def warmup_findings(config: dict, recipe: Recipe) -> Iterator[Finding]:
    kn, base, kind = config["train_batch_size"], recipe.linear_scaling.base_batch, recipe.warmup.kind
    if kn <= base and kind != "none":
        yield Finding(
            "R03",
            "lbsgd.warmup.kind",
            f"is {kind} for {kn} images, but up to base_batch = {base} there is nothing to warm up to",
            'use {"kind": "none", "epochs": 0}',
            correction={"lbsgd.warmup": {"kind": "none", "epochs": 0}},
        )


# --- the run against its processes and its data -------------------------------------------------------------------------


def passes_findings(config: dict, world_size: int) -> Iterator[Finding]:
    """gradient_accumulation_steps may be left to follow from the world size; where it stands it must agree."""
    passes = config.get("gradient_accumulation_steps")
    kn, micro_batch = config["train_batch_size"], config["train_micro_batch_size_per_gpu"]
    if passes is not None and passes != kn / (world_size * micro_batch):
        yield Finding(
            "F05",
            "gradient_accumulation_steps",
            f"is {passes!r}, but {kn} images on {world_size} processes x "
            f"{micro_batch} are {kn / (world_size * micro_batch):g} passes",
            "delete it: it follows",
            correction={"gradient_accumulation_steps": DELETE},
        )


def fit_findings(recipe: Recipe, global_batch: int, micro_batch: int, world_size: int) -> Iterator[Finding]:
    """kn = k·n = world_size · micro_batch · passes must hold in whole numbers, and an epoch must have an iteration."""
    n = recipe.batch_norm.per_worker_batch
    k = global_batch // n
    if global_batch % n:
        yield Finding(
            "R02",
            "train_batch_size",
            f"{global_batch} is no multiple of n = {n}",
            f"k = kn/n workers must be whole: use {max(1, k) * n} or {(k + 1) * n}",
        )
    elif k % world_size:
        fitting = divisors(k)
        yield Finding(
            "F01",
            "train_batch_size",
            f"k = {k} workers of n = {n} images cannot be divided among {world_size} processes",
            f"numbers of processes that fit: {shortened(fitting)}",
        )
    elif micro_batch % n or global_batch % (world_size * micro_batch):
        fitting = [n * d for d in divisors(k // world_size)]
        yield Finding(
            "F02",
            "train_micro_batch_size_per_gpu",
            f"{micro_batch} is no multiple of n = {n} that divides the "
            f"{global_batch // world_size} images of each of {world_size} processes",
            f"micro batches that fit: {shortened(fitting)}",
        )
    wanted = recipe.batch_norm.statistics_images
    if wanted and wanted > recipe.num_images:
        yield Finding(
            "F04",
            "lbsgd.batch_norm.statistics_images",
            f"{wanted} is more than the {recipe.num_images} images of the training data",
            "use fewer",
        )
    if recipe.num_images < global_batch:
        yield Finding(
            "F03",
            "train_batch_size",
            f"one global batch of {global_batch} images is more than the "
            f"{recipe.num_images} images of the training data",
            "use a smaller --global_batch or more data",
        )


def divisors(number: int) -> list[int]:
    """What divides a number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def shortened(numbers: list[int], most: int = 12) -> str:
    """Numbers as a list that stays on one line."""
    if len(numbers) <= most:
        return ", ".join(map(str, numbers))
    return ", ".join(map(str, numbers[: most - 1])) + f", ... {numbers[-1]}"
