"""`lbsgd report`: the paper's tables next to ours, curves and a page, from run logs alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lbsgd.commands.flag_types import named, path
from lbsgd.commands.reader import reader_may_leave
from lbsgd.errors import ConfigError, DataError
from lbsgd.units import counted, printable

if TYPE_CHECKING:
    from lbsgd.report.run_log import LoggedRun

EPILOG = """
--output_dir DIR receives tables.md, tables.csv, pictures (PNG, SVG) and index.html. --update FILE needs no RUN."""


PIPE_WIDTH = 160  # for a file or a pipe
TABLES = ("table1", "table2a", "table2b", "table2c", "figure1", "table3a", "table3b")


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.epilog = EPILOG
    add = command.add_argument
    add(
        "runs",
        type=named,
        metavar="RUN",
        nargs="*",
        help="folder of a run, its log.jsonl, or a folder with runs below it",
    )
    add("--output_dir", type=path, metavar="DIR", help="where the files go (default: only print)")
    which = f"make only this table; may be repeated: {', '.join(TABLES)} (default: all)"
    add("--table", action="append", default=[], choices=TABLES, metavar="NAME", help=which)
    add(
        "--update",
        type=path,
        action="append",
        default=[],
        metavar="FILE",
        help="write the marked regions of a Markdown file again",
    )


@reader_may_leave()
def run(given: argparse.Namespace) -> int:
    """Print the tables of all runs that can be read, and write files if no run is missing. Raises LbsgdError."""
    from lbsgd.report.groups import read_runs  # late: `lbsgd --help` needs none of it
    from lbsgd.report.regions import update

    if not given.runs and not given.update:
        raise ConfigError("lbsgd report: name a RUN, or a file with --update; `lbsgd report --help` says more")
    if not given.runs and (unread := "--output_dir" if given.output_dir else "--table" if given.table else ""):
        raise ConfigError(f"lbsgd report: {unread} is about the RUNs that you name; leave it out, or name some")
    changed = update(given.update)
    for file in given.update:
        print(f"{file}: {'written again' if file in changed else 'as the logs have it'}")
    runs, bad = read_runs(given.runs)
    unmade: list[str] = []
    try:
        if runs:
            unmade = show(runs, given, bad)
    except DataError as error:  # reported below, together with other errors
        bad.append(str(error))
    if bad and given.output_dir:
        bad.append(f"{given.output_dir}: nothing is written there, because these runs would be missing")
    if bad or unmade:
        raise DataError(*bad, *unmade)
    return 0


def show(runs: Sequence[LoggedRun], given: argparse.Namespace, bad: list[str]) -> list[str]:
    """Print tables of runs. If nothing is bad, write them into --output_dir, too.

    Adds to `bad` the reasons why runs make no row. Returns the reasons why wanted tables are missing.
    """
    from lbsgd.report.families import families_of
    from lbsgd.report.groups import read_rows
    from lbsgd.report.paper_tables import tables_of, why_not
    from lbsgd.report.printer import Printer
    from lbsgd.report.tables import error_table
    from lbsgd.report.write import write_report

    rows, without_row = read_rows(runs)
    bad += without_row  # such as two runs of a row that differ in code
    families = families_of(rows)
    tables = tables_of(families, given.table)
    printer = Printer(PIPE_WIDTH)  # rich would take 80 columns and leave out half of a table
    if not tables or len(runs) <= 20:
        printer.print(error_table(runs, printer.width))
    for table in tables:
        printer.print(table.rich(printer.width))
    if bad:  # said here, too, because the errors go to stderr
        printer.print(f"\nthese tables lack what cannot be read: {counted(len(bad), 'error')}")
    elif given.output_dir:
        title = ", ".join(printable(Path(place).resolve().name) for place in given.runs)
        for file in write_report(families, given.output_dir, title, given.table):
            print(file)
    return why_not(families, given.table)
