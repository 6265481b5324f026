"""`lbsgd report`: lay runs over each other in a table and a picture."""

from __future__ import annotations

import argparse


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, or its log.jsonl")
    command.add_argument("--output", metavar="FILE", default="curves.png", help="the picture (default: %(default)s)")


def run(given: argparse.Namespace) -> int:
    from rich.console import Console  # late, like the report: `lbsgd --help` needs neither

    from lbsgd.report.curves import curves
    from lbsgd.report.run_log import read_run
    from lbsgd.report.tables import error_table

    runs = [read_run(path) for path in given.runs]
    Console().print(error_table(runs))
    curves(runs, given.output)
    print(f"curves: {given.output}")
    return 0
