"""The lines with which a recipe begins: what the run is."""

from __future__ import annotations

from pathlib import Path

from lbsgd.config.plan import Plan
from lbsgd.disk import say
from lbsgd.report.lines import on_width, say_fact


def print_plan(plan: Plan, output_dir: Path) -> None:
    """Print what the run is. Raises OutputError."""
    for name, value in plan.summary().items():
        say_fact(name, value)
    for change in plan.changes:
        say_fact("changed", change)
    for warning in plan.warnings:
        say(on_width(f"warning: {plan.name}.json: {warning}"))
    say_fact("output", str(output_dir))
