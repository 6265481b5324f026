"""The first lines that a recipe prints: what the run is."""

from __future__ import annotations

from pathlib import Path

from lbsgd.config.plan import Plan
from lbsgd.data.folder import ValData
from lbsgd.report.lines import say_fact, warn

SAME_IMAGES = "{} holds the images of {}, so the validation error says nothing of images never seen"


def print_plan(plan: Plan, output_dir: Path, data: ValData | None, training: bool = True) -> None:
    """Print what the run is, without a schedule if it does not train, and the warnings about it.

    Raises OutputError.
    """
    for name, value in plan.summary(training).items():
        say_fact(name, value)
    for change in plan.changes:
        say_fact("changed", change)
    for warning in plan.warnings:
        warn(f"{plan.name}.json: {warning}")
    if data and data.train_fingerprint == data.val.fingerprint:
        warn(SAME_IMAGES.format(data.val.path, "train.beton"))
    say_fact("output", str(output_dir))
