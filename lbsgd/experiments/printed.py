"""Prints a study for `lbsgd reproduce`: tables on a terminal, Markdown into a file or a pipe."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from lbsgd.experiments.answers import HEADS, Answer, markdown
from lbsgd.output import say
from lbsgd.report.paper_table import WIDE, PaperTable
from lbsgd.report.printer import Printer

NARROW = 3  # columns of the claims that fit into a terminal of 80


def print_study(tables: Sequence[PaperTable], found: Sequence[Answer]) -> None:
    """Print a study's tables and the answers to its claims, if it has any."""
    printer = Printer(WIDE)
    if not printer.is_for_people:
        texts = [*(table.markdown() for table in tables), *([markdown(found)] if found else [])]
        say(*(line for text in texts for line in text.split("\n")))
        return
    for table in tables:
        printer.print(table.rich(printer.width))
    if found:
        printer.print(claims_table(found, printer.width))
    printer.print()


def claims_table(found: Sequence[Answer], width: int) -> Table:
    """Return the claims with their answers. Below a width of WIDE the table has only the most important columns."""
    title = "\nClaims, stated before the runs"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    shown = len(HEADS) if width >= WIDE else NARROW
    for head in HEADS[:shown]:
        table.add_column(head, justify="right" if head.startswith("difference") else "left", overflow="fold")
    for answer in found:
        table.add_row(*map(escape, answer.cells[:shown]))
    return table
