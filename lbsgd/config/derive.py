"""Derive the numbers in DeepSpeed's own blocks from a recipe (Sec. 2.1, 2.2)."""

from __future__ import annotations

import math
from typing import Any

from lbsgd.algorithm.schedule import scaled_lr
from lbsgd.config.keypath import get, is_number, put
from lbsgd.config.schema import Recipe, Warmup

NO_WARMUP = {"kind": "none", "epochs": 0}


def length_in_iterations(recipe: Recipe, global_batch: int) -> int:
    """Return a run's iterations: those of its whole epochs, or of as many images as the recipe's iterations take."""
    if recipe.epochs is not None:
        return recipe.epochs * iterations_per_epoch(recipe.num_images, global_batch)
    assert recipe.iterations is not None
    return max(1, of_batch(recipe.iterations, recipe, global_batch))


def warmup_in_iterations(recipe: Recipe, global_batch: int) -> int:
    """Return W. A warmup in iterations has the same number at every global batch, unless the recipe scales it."""
    warmup = recipe.warmup
    if warmup.iterations is not None:
        return of_batch(warmup.iterations, recipe, global_batch) if warmup.scaled else warmup.iterations
    return round((warmup.epochs or 0) * iterations_per_epoch(recipe.num_images, global_batch))


def decay_in_iterations(recipe: Recipe, global_batch: int) -> tuple[int, ...]:
    """Return the updates before which η is divided."""
    if recipe.decay.iterations is not None:
        return tuple(of_batch(point, recipe, global_batch) for point in recipe.decay.iterations)
    per_epoch = iterations_per_epoch(recipe.num_images, global_batch)
    return tuple(round(epoch * per_epoch) for epoch in recipe.decay.epochs)


def of_batch(iterations: int, recipe: Recipe, global_batch: int) -> int:
    """Convert iterations of base_batch images to iterations of kn images: the same number of images."""
    return round(iterations * recipe.linear_scaling.base_batch / global_batch)


def start_lr(recipe: Recipe, reference_lr: float) -> float:
    """Return η0, the first learning rate of a warmup."""
    fraction = recipe.warmup.start_fraction
    return recipe.linear_scaling.base_lr if fraction is None else fraction * reference_lr


def is_needless(recipe: Recipe, global_batch: int) -> bool:
    """Whether the warmup goes from base_lr to a learning rate that is no larger."""
    begins_at_base = recipe.warmup.kind != "none" and recipe.warmup.start_fraction is None
    return begins_at_base and global_batch <= recipe.linear_scaling.base_batch


def iterations_per_epoch(num_images: int, global_batch: int) -> int:
    """Return ⌊N/kn⌋; the remainder of each epoch's permutation is left out."""
    return num_images // global_batch


def explicit_numbers(recipe: Recipe, global_batch: int) -> dict[str, float]:
    """Return the numbers that DeepSpeed's blocks must hold for this recipe and global batch, by key path.

        optimizer.params.lr              η, by the scaling rule
        scheduler.params.warmup_min_lr   η0 with gradual warmup, else η
        scheduler.params.warmup_max_lr   η
        scheduler.params.warmup_num_steps   W, at least 1
        optimizer.params.weight_decay    base · base_lr/η, with weight_decay.scaling inverse_lr only

    WarmupLR can express gradual warmup in full, but not constant or no warmup; plain DeepSpeed then holds η.
    """
    scaling, decay = recipe.linear_scaling, recipe.weight_decay
    gradual = recipe.warmup.kind == "gradual"
    reference = scaled_lr(global_batch, scaling.base_lr, scaling.base_batch, scaling.rule)
    numbers = {
        "optimizer.params.lr": reference,
        "scheduler.params.warmup_min_lr": start_lr(recipe, reference) if gradual else reference,
        "scheduler.params.warmup_max_lr": reference,
        "scheduler.params.warmup_num_steps": max(1, warmup_in_iterations(recipe, global_batch)),
    }
    if decay.base is not None:  # the schema allows a base with inverse_lr only
        numbers["optimizer.params.weight_decay"] = decay.base * scaling.base_lr / reference
    return numbers


def derive(config: dict[str, Any], recipe: Recipe) -> Recipe:
    """Put everything that follows from the recipe and the global batch into a JSON, and return the resulting recipe.

    Up to base_batch images there is nothing to warm up to, so the warmup is removed.
    """
    kn = config["train_batch_size"]
    if is_needless(recipe, kn):
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


def images_per_pass(global_batch: int, per_worker_batch: int, gpus: int, most: int) -> int:
    """Return the largest micro batch of whole workers, at most `most` images, that divides a GPU's share of kn."""
    workers = global_batch // (gpus * per_worker_batch)
    fitting = [d for d in divisors(workers) if d * per_worker_batch <= most]
    return per_worker_batch * max(fitting, default=1)
