"""Rules about the fit of warmup and decay to a run's length, all in whole iterations."""

from __future__ import annotations

from collections.abc import Iterator

from lbsgd.config.checks.rule import Hit, rule
from lbsgd.config.checks.subject import Planned
from lbsgd.config.derive import (
    decay_in_iterations,
    iterations_per_epoch,
    length_in_iterations,
    warmup_in_iterations,
)


@rule(
    "F08",
    "a warmup shorter than an iteration",
    lbsgd="warning",
    why="A warmup of a part of an epoch is rounded to whole iterations. A warmup that rounds to 0 is none: the first "
    "update has the full learning rate.",
    fix="give at least one iteration, or use kind none",
    example={"lbsgd": {"warmup": {"epochs": 0.001}}, "scheduler": {"params": {"warmup_num_steps": 1}}},
)
def no_iteration_of_warmup(planned: Planned) -> Iterator[Hit]:
    recipe, kn, warmup = planned.recipe, planned.global_batch, planned.recipe.warmup
    has_epochs = iterations_per_epoch(recipe.num_images, kn) > 0  # else F03 reports it
    if has_epochs and warmup.kind != "none" and warmup_in_iterations(recipe, kn) == 0:
        unit = "epochs" if warmup.iterations is None else "iterations"
        said = f"is {getattr(warmup, unit):g}, which is no iteration of {kn} images"
        yield Hit(f"lbsgd.warmup.{unit}", said)


@rule(
    "F06",
    "a schedule that reaches beyond its run",
    lbsgd="warning",
    why="Warmup and decay points do not follow the run's length, lbsgd.epochs or lbsgd.iterations. In a run of 4 "
    "epochs the paper's warmup of 5 never reaches the learning rate, and none of its decays at 30, 60 and 80 comes.",
    fix="choose lbsgd.warmup and lbsgd.decay for the run's length",
    example={"lbsgd": {"epochs": 70}},
)
def schedule_within_run(planned: Planned) -> Iterator[Hit]:
    recipe, kn = planned.recipe, planned.global_batch
    length, warmup = length_in_iterations(recipe, kn), warmup_in_iterations(recipe, kn)
    if not length:  # F03 reports it
        return
    unit = unit_of(planned)
    first = min([length, *decay_in_iterations(recipe, kn)])
    if first == 0:
        yield Hit(f"lbsgd.decay.{unit}", "has a point before the first update: no update has the full learning rate")
    elif warmup >= first:
        end = f"the run has {length}" if first == length else f"the first decay is at {first}"
        said = f"is {getattr(recipe.warmup, unit):.12g}, {warmup} iterations of {kn} images, but {end}"
        yield Hit(f"lbsgd.warmup.{unit}", f"{said}: no update has the full learning rate")
    missed = [f"{point:.12g}" for point, iteration in decays_of(planned) if iteration >= length]
    if missed:
        run = f"the run of {getattr(recipe, unit)} {unit}"
        yield Hit(f"lbsgd.decay.{unit}", f"has {', '.join(missed)}, but {run} has no update from there on")


@rule(
    "F10",
    "decay points in one iteration",
    lbsgd="warning",
    why="Decay points are rounded to whole iterations. Where two round to the same, the learning rate falls twice at "
    "once, and no update has the one in between.",
    fix="move the points apart, or leave one out",
    example={"lbsgd": {"decay": {"epochs": [30, 30.001, 80]}}},
)
def decays_apart(planned: Planned) -> Iterator[Hit]:
    recipe, kn = planned.recipe, planned.global_batch
    length, decays = length_in_iterations(recipe, kn), decays_of(planned)
    for iteration in sorted({at for _, at in decays if at < length}):  # F06 reports the later ones
        points = [f"{point:.12g}" for point, at in decays if at == iteration]
        if len(points) > 1:
            said = f"has {', '.join(points)}, which are all iteration {iteration:,} of {kn} images"
            yield Hit(f"lbsgd.decay.{unit_of(planned)}", said)


def unit_of(planned: Planned) -> str:
    """Return the key in which the recipe gives its length and its decay points."""
    return "epochs" if planned.recipe.iterations is None else "iterations"


def decays_of(planned: Planned) -> list[tuple[float, int]]:
    """Return each decay point as the recipe gives it, and its iteration."""
    recipe = planned.recipe
    iterations = decay_in_iterations(recipe, planned.global_batch)
    return [*zip(getattr(recipe.decay, unit_of(planned)), iterations, strict=True)]


RULES = (schedule_within_run, no_iteration_of_warmup, decays_apart)
