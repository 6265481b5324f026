"""A table in the paper's layout: the paper's numbers in the first columns, then ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from lbsgd.report.groups import Group
from lbsgd.report.seeds import code_of
from lbsgd.report.statistics import difference
from lbsgd.units import markdown_table

FIRST_OF_OURS = 4  # column
WIDE = 112  # columns of a terminal that hold a whole table


class Columns(NamedTuple):
    """The heads of a table.

    heads          the row's name, three columns of the paper, then ours
    narrow         the columns that fit into a terminal of 80
    measured_on    what the paper's numbers were measured on
    """

    heads: tuple[str, ...]
    narrow: tuple[int, ...]
    measured_on: str

    def with_sides(self, paper: str, ours: str) -> list[str]:
        """Return the heads with one word before each of the paper's and another before the first of ours."""
        return [
            paper + head if 1 <= number < FIRST_OF_OURS else ours + head if number == FIRST_OF_OURS else head
            for number, head in enumerate(self.heads)
        ]


@dataclass(frozen=True)
class PaperTable:
    """A table of cells. `name` is used for files and regions; `ours` says what our numbers were measured on."""

    name: str
    title: str
    ours: str
    columns: Columns
    rows: tuple[tuple[str, ...], ...]
    groups: tuple[Group, ...]

    @property
    def curve_names(self) -> list[str]:
        """The names of the rows' curves with the table's kn, which in Table 3a is the kn of the pre-training."""
        return [f"{row[0]}, kn {row[FIRST_OF_OURS]}" for row in self.rows]

    @property
    def measured(self) -> str:
        """Say what both sides were measured on."""
        return f"Paper: {self.columns.measured_on}, ours: {self.ours}."

    @property
    def note(self) -> str:
        """Say which rows were run by other code, if any were."""
        return note_of_codes(self.curve_names, self.groups) if self.groups else ""

    def markdown(self) -> str:
        body = markdown_table(self.columns.with_sides("paper: ", "ours: "), self.rows)
        below = f"\n{self.note}\n" if self.note else ""
        return f"**{self.title}.** {self.measured}\n\n{body}\n{below}"

    def csv(self, ending: str = "") -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return heads and rows for a CSV file. Each row begins with the table's name, as its picture's file does."""
        first, *heads = self.columns.heads
        sides = (
            f"{'paper' if number < FIRST_OF_OURS else 'ours'} {head}" for number, head in enumerate(heads, start=1)
        )
        return ("table", first, *sides), [(self.name + ending, *row) for row in self.rows]

    def rich(self, width: int = 120) -> RichTable:
        """Return the table for a terminal. Below a width of WIDE it has only the most important columns."""
        heads = self.columns.heads
        shown = range(len(heads)) if width >= WIDE else self.columns.narrow
        title = escape(f"\n{self.title}\n{self.measured[0].lower()}{self.measured[1:-1]}")
        table = RichTable(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        table.caption, table.caption_justify = escape(self.note) or None, "left"
        for number in shown:
            of_paper = 1 <= number < FIRST_OF_OURS
            side = "paper\n" if of_paper else "ours\n" if heads[number] in heads[1:FIRST_OF_OURS] else ""
            table.add_column(side + heads[number], justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*(escape(row[number]) for number in shown))
        return table


def error_cell(row: Group, unit: str = "") -> str:
    """Return mean ± std of the finished runs, and how many others diverged or have not finished."""
    return ", ".join([*([f"{row.spread} {unit}".rstrip()] if row.spread else []), *without_result(row)])


def without_result(row: Group) -> list[str]:
    """Return how many seeds of a row have no result and why, in the words that tables and pictures share."""
    said = []
    others = len(row.runs) - len(row.finished) - row.num_diverged  # running or killed: the logs do not tell which
    if row.num_diverged:
        said.append("all diverged" if row.lost else f"{row.num_diverged} diverged")
    said += [f"{others} not finished"] if others else []
    return said


def difference_cell(row: Group, baseline: Group | None) -> str:
    """Return the difference from the baseline with its interval; nothing for the baseline itself, or without one.

    A row with a diverged seed has no difference, because its other seeds must not stand for all.
    """
    if baseline is None or row is baseline or not row.whole or not baseline.whole:
        return ""
    apart = difference(row.values, baseline.values)
    return str(apart or "")


def note_of_codes(names: Sequence[str], rows: Sequence[Group]) -> str:
    """Name the rows that were run by other code than the first row whose code is known. Old logs do not tell."""
    known = [(name, code) for name, row in zip(names, rows, strict=True) if (code := code_of(row.runs[0]))]
    others = [name for name, code in known if code != known[0][1]]
    return f"Run by other code of lbsgd than {known[0][0]}: {'; '.join(others)}." if others else ""
