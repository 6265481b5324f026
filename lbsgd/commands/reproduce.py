"""`lbsgd reproduce`: run a table or figure of the paper on your machine, and report it."""

from __future__ import annotations

import argparse

from lbsgd.commands.flag_types import path, positive, whole_number
from lbsgd.commands.reader import reader_may_leave
from lbsgd.output import require_output
from lbsgd.processes.signals import stoppable

MOST_SEEDS = 10_000  # more is a typing mistake

DESCRIPTION = """run a table or figure of the paper on your machine, and report it

  lbsgd reproduce table1 digits     warmup: none, constant, gradual; 20 runs, about 45 minutes on 2 cores
  lbsgd reproduce table1 table2a table2b figure1 digits     all four; rows that they share run once

After any interruption the same command goes on. All runs of a grid use the code of the commit that it began with."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    from lbsgd.experiments.catalogue import DATA_SETS, STUDIES

    command.description = DESCRIPTION
    add = command.add_argument
    add("studies", nargs="+", metavar="EXPERIMENT", help=", ".join(STUDIES))
    add("data_set", metavar="DATA_SET", help=", ".join(DATA_SETS))
    add(
        "--seeds",
        type=seeds,
        default=tuple(range(5)),
        metavar="N|A-B",
        help="number of seeds, or seeds from A to B (default: 5)",
    )
    add(
        "--side_by_side",
        type=positive,
        metavar="N",
        help="number of runs at a time (default: one per GPU, else one per core)",
    )
    add("--epochs", type=positive, metavar="N", help="stop every run after N epochs, to try a grid out")
    add("--work_dir", type=path, metavar="DIR", help="where data/ and runs/ go (default: the repository)")
    add("--results", type=path, metavar="DIR", help="where logs and pages go (default: results/ of the repository)")
    add("--list", action="store_true", help="print the commands of all runs, to paste here, and run nothing")


def seeds(text: str) -> tuple[int, ...]:
    """`5` means the seeds 0 to 4, and `5-9` the seeds 5 to 9."""
    from lbsgd.config.schema import SEEDS  # late: the other commands start without the schema

    head, dash, tail = text.partition("-")
    first, end = (whole_number(head), whole_number(tail)) if dash else (0, whole_number(head))
    if first is None or end is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of seeds, such as 5, nor a range, such as 5-9")
    chosen = range(first, end + 1 if dash else end)
    if not chosen:
        raise argparse.ArgumentTypeError(f"{text!r} are no seeds; give at least 1")
    if chosen[MOST_SEEDS:]:
        raise argparse.ArgumentTypeError(f"{text!r} are too many seeds; give at most {MOST_SEEDS:,}")
    if chosen[-1] >= SEEDS:
        raise argparse.ArgumentTypeError(f"{text!r} has seeds above {SEEDS - 1}, which no recipe takes")
    return tuple(chosen)


def run(given: argparse.Namespace) -> int:
    """List the runs of studies, or run and report them. Raises LbsgdError."""
    with stoppable("the same command goes on"):  # the runner itself lets started runs save first
        list_or_reproduce(given)
    return 0


def list_or_reproduce(given: argparse.Namespace) -> None:
    from lbsgd.errors import ConfigError
    from lbsgd.experiments.catalogue import find_data_set, find_study
    from lbsgd.experiments.checkout import ROOT
    from lbsgd.experiments.reproduce import GridRequest, listed, reproduce

    studies = tuple(find_study(name) for name in given.studies)
    for study in studies:
        if study.grid != studies[0].grid:
            raise ConfigError(
                f"reproduce: the runs of {study.name} are of another grid than those of {studies[0].name}; give a "
                "command for each"
            )
    request = GridRequest(
        studies=studies,
        data=find_data_set(given.data_set),
        seeds=given.seeds,
        work_dir=(given.work_dir or ROOT).resolve(),
        results=(given.results or ROOT / "results").resolve(),
        side_by_side=given.side_by_side,
        epochs=given.epochs,
    )
    if given.list:
        with reader_may_leave():
            return print(listed(request))
    require_output()
    try:
        reproduce(request)
    except OSError as error:  # no right to write, or a full disk
        raise ConfigError(
            f"reproduce: {error.filename or request.grid}: {error.strerror}; mend it, and the same command goes on, or "
            "give another place with --work_dir or --results"
        ) from None
