"""The numbers that follow from a recipe: what must stand in DeepSpeed's own blocks (Sec. 2.1, 2.2)."""

from __future__ import annotations

import math
from typing import Any

from lbsgd.algorithm.schedule import scaled_lr
from lbsgd.config.keypath import get, is_number, put
from lbsgd.config.schema import Recipe, Warmup

NO_WARMUP = {"kind": "none", "epochs": 0}


def iterations_per_epoch(num_images: int, global_batch: int) -> int:
    """Return ⌊N/kn⌋; the remainder of each epoch's permutation is left out."""
    return num_images // global_batch


def explicit_numbers(recipe: Recipe, global_batch: int) -> dict[str, float]:
    """Return the numbers that must stand in DeepSpeed's blocks for this recipe and global batch, by key path.

        optimizer.params.lr              η, by the scaling rule
        scheduler.params.warmup_min_lr   η0 with gradual warmup, else η
        scheduler.params.warmup_max_lr   η
        scheduler.params.warmup_num_steps   W, at least 1
        optimizer.params.weight_decay    base · η0/η, with weight_decay.scaling inverse_lr only

    WarmupLR can say gradual warmup in full. It cannot say constant or no warmup; plain DeepSpeed then holds η.
    """
    scaling, decay = recipe.linear_scaling, recipe.weight_decay
    reference = scaled_lr(global_batch, scaling.base_lr, scaling.base_batch, scaling.rule)
    warmup = round(recipe.warmup.epochs * iterations_per_epoch(recipe.num_images, global_batch))
    numbers = {
        "optimizer.params.lr": reference,
        "scheduler.params.warmup_min_lr": scaling.base_lr if recipe.warmup.kind == "gradual" else reference,
        "scheduler.params.warmup_max_lr": reference,
        "scheduler.params.warmup_num_steps": max(1, warmup),
    }
    if decay.base is not None:  # the schema allows a base with inverse_lr only
        numbers["optimizer.params.weight_decay"] = decay.base * scaling.base_lr / reference
    return numbers


def derive(config: dict[str, Any], recipe: Recipe) -> Recipe:
    """Put into a JSON everything that follows from its recipe and global batch, and return the recipe that results.

    Up to base_batch images there is nothing to warm up to, so the warmup goes.
    """
    kn = config["train_batch_size"]
    if kn <= recipe.linear_scaling.base_batch and recipe.warmup.kind != "none":
        config["lbsgd"]["warmup"] = dict(NO_WARMUP)
        recipe = recipe.model_copy(update={"warmup": Warmup.model_validate(NO_WARMUP)})
    for key, number in explicit_numbers(recipe, kn).items():
        if not is_close(get(config, key), number):  # a right number keeps its digits
            put(config, key, tidy(number))
    return recipe


def is_close(value: Any, number: float) -> bool:
    """Whether a JSON value is this number, to six digits."""
    return is_number(value) and math.isclose(value, number, rel_tol=1e-6)


def tidy(number: float) -> float:
    """Return a derived number as a person would write it: 4.8, not 4.800000000000001."""
    return number if isinstance(number, int) else float(f"{number:.12g}")


def divisors(number: int) -> list[int]:
    """Return all divisors of a number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
