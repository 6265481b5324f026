"""Lays out the tables of `lbsgd plan`, which no terminal is too narrow for."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from lbsgd.report.lines import fitted

Row = list[list[str]]  # cells, each a list of its lines
BREAK = "|"  # marks where a head may be hyphenated


def table_lines(heads: Sequence[str], rows: Iterable[Sequence[str]], num_words: int, width: int) -> list[list[str]]:
    """Return the lines of the heads and of each row: words in the first num_words columns, numbers in the others.

    A table that is too wide gets heads of several lines, less space between columns, and a last column that wraps. If
    that is still too wide, each row becomes a list of its cells, and there is no line of heads.
    """
    rows = list(rows)
    cells: list[Row] = [[[cell] for cell in row] for row in rows]
    whole = [[[head.replace(BREAK, "")] for head in heads], *cells]
    if 1 + sum(widths_of(whole)) + 2 * (len(heads) - 1) <= width:
        return [joined(row, widths_of(whole), num_words, "  ") for row in whole]
    divided = [head.replace(BREAK, "-\n").replace(" ", "\n").split("\n") for head in heads[num_words:]]
    narrow = [[[head] for head in heads[:num_words]] + divided, *cells]
    *others, _ = widths_of(narrow)
    room = max(1, width - 1 - sum(others) - len(others))
    for row in cells:
        row[-1] = textwrap.wrap(row[-1][0], room, break_long_words=False) or [""]
    widths = widths_of(narrow)
    if 1 + sum(widths) + len(widths) - 1 > width:
        return [[], *(listed([head.replace(BREAK, "") for head in heads], row, width) for row in rows)]
    return [joined(row, widths, num_words, " ") for row in narrow]


def listed(heads: Sequence[str], row: Sequence[str], width: int) -> list[str]:
    """Return a row as lines: its first cell, then the others below it, each after its head."""
    of_heads = max(map(len, heads[1:]), default=0)
    lines = [fitted(f" {heads[0]} {row[0]}" if heads[0] else f" {row[0]}", width, 4)]
    for head, cell in zip(heads[1:], row[1:], strict=True):
        lines.append(fitted(f"     {head:{of_heads}}  {cell}", width, 7))
    return [line for each in lines for line in each.split("\n")]


def widths_of(rows: Sequence[Row]) -> list[int]:
    return [max(len(line) for cell in column for line in cell) for column in zip(*rows, strict=True)]


def joined(row: Row, widths: Sequence[int], num_words: int, gap: str) -> list[str]:
    """Return a row's lines, each after a space."""
    height = max(map(len, row))
    filled = [cell + [""] * (height - len(cell)) for cell in row]
    lines = []
    for parts in zip(*filled, strict=True):
        sides = [str.ljust] * num_words + [str.rjust] * (len(widths) - num_words)
        lines.append(" " + gap.join(side(*each) for side, *each in zip(sides, parts, widths, strict=True)).rstrip())
    return lines
