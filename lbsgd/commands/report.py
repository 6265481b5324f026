"""`lbsgd report`: the paper's tables beside ours, curves and a page, from run logs alone."""

from __future__ import annotations

import argparse
from pathlib import Path

EPILOG = """
--output_dir DIR writes tables.md, tables.csv, pictures (PNG, SVG) and index.html there.
--update FILE writes the marked regions of a Markdown file again; no RUN is needed then."""


PIPE_WIDTH = 160  # of a file, which has none
TABLES = ("table1", "table2a", "table2b", "table2c", "figure1", "table3a", "table3b")


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.epilog = EPILOG
    add = command.add_argument
    add("runs", metavar="RUN", nargs="*", help="folder of a run, its log.jsonl, or a folder with runs below it")
    add("--output_dir", type=Path, metavar="DIR", help="where the files go (default: only print)")
    which = f"one of {', '.join(TABLES)}; may be repeated (default: all)"
    add("--table", action="append", default=[], choices=TABLES, metavar="NAME", help=which)
    add("--update", type=Path, action="append", default=[], metavar="FILE", help="write the regions of FILE again")


def run(given: argparse.Namespace) -> int:
    from lbsgd.errors import ConfigError  # late, like the report: `lbsgd --help` needs none of it
    from lbsgd.report.families import families_of
    from lbsgd.report.groups import find_runs, group_runs
    from lbsgd.report.paper_tables import paper_tables, wanted
    from lbsgd.report.printer import Printer
    from lbsgd.report.regions import update
    from lbsgd.report.tables import error_table
    from lbsgd.report.write import write_report

    if not given.runs and not given.update:
        raise ConfigError("lbsgd report: name a RUN, or a file with --update; `lbsgd report --help` says more")
    for file in given.update:
        print(f"{file}: {'written again' if update(file) else 'as the logs have it'}")
    if not given.runs:
        return 0
    runs = find_runs(given.runs)
    families = families_of(group_runs(runs))
    tables = [table for family in families for table in wanted(paper_tables(family), given.table)]
    printer = Printer(PIPE_WIDTH)  # rich would take 80 columns and leave half of a table out
    if not tables or len(runs) <= 20:
        printer.print(error_table(runs, printer.width))
    for table in tables:
        printer.print(table.rich(printer.width))
    if given.output_dir:
        title = ", ".join(Path(place).resolve().name for place in given.runs)
        for path in write_report(families, given.output_dir, title, given.table):
            print(path)
    return 0
