"""The runs of one row: all by the same code and recipe script, one per seed."""

from __future__ import annotations

from collections.abc import Sequence
from shlex import quote
from typing import Any

from lbsgd.errors import DataError
from lbsgd.report.run_log import LoggedRun


def one_of_each_seed(runs: Sequence[LoggedRun]) -> list[LoggedRun]:
    """Return one run per seed, in the order of the seeds: the first with a result, else the first.

    Raises DataError if two runs of a seed have finished with different numbers, because the order of the arguments
    must not decide which one counts.
    """
    seeds: dict[int, LoggedRun] = {}
    for run in sorted(runs, key=lambda run: run.result is None):
        first = seeds.setdefault(seed_of(run), run)
        if run.result is not None and outcome(run) != outcome(first):
            raise DataError(
                f"{first.path} and {run.path} are runs of one recipe and seed {seed_of(run)}, and have finished with "
                "different numbers; leave one out"
            )
    return [seeds[seed] for seed in sorted(seeds)]


def outcome(run: LoggedRun) -> list[dict[float, Any]]:
    """Return the numbers that a run is judged by, for every epoch. Two copies of a run have the same."""
    return [run.curve(measure.key) for measure in run.measures]


def seed_of(run: LoggedRun) -> int:
    return run.header["recipe"]["seed"]


def require_one_code(runs: Sequence[LoggedRun]) -> None:
    """Raise DataError if the logs say that two runs were run by different code of lbsgd, or by different recipes.

    Recipes of the same `name` may differ in what the JSON does not hold, such as the loss.
    """
    for key, what, instead in (
        ("code", "code of lbsgd", "or run one again"),
        ("script", "recipe scripts", "or give a recipe that trains something else another `name`"),
    ):
        codes = {run.header.get("environment", {}).get(key): run for run in runs}
        codes.pop(None, None)  # an early log does not say it
        if len(codes) > 1:
            first, second, *_ = codes.values()
            raise DataError(
                f"{first.path} and {second.path} were run by different {what}, and the runs of a row must not differ "
                f"in that; report them apart, such as `lbsgd report {quote(str(first.path.parent))}`, {instead}"
            )


def code_of(run: LoggedRun) -> str | None:
    return run.header.get("environment", {}).get("code")
