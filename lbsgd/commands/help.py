"""Fits --help to the width of the terminal."""

from __future__ import annotations

import re
import textwrap
from argparse import PARSER, Action, HelpFormatter
from collections.abc import Generator
from itertools import groupby

INDENT = " " * 6  # of the further lines of a kept line


class Help(HelpFormatter):
    """Fits help to the terminal: it fills paragraphs, and keeps each indented line, such as a command, for itself."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for is_paragraph, block in groupby(text.strip().splitlines(), key=lambda line: line[:1] not in ("", " ")):
            kept = [part for line in block for part in ([line] if is_paragraph else kept_line(line, width))]
            lines += textwrap.wrap(" ".join(kept), width) if is_paragraph else kept
        return "\n".join(lines)

    def _format_action(self, action: Action) -> str:
        """Leave out the line above the list of commands, which only repeats their heading."""
        said = super()._format_action(action)
        return said.partition("\n")[2] if action.nargs == PARSER else said

    def _iter_indented_subactions(self, action: Action) -> Generator[Action, None, None]:
        """List commands where flags are listed; argparse counts no further indent when it makes the columns."""
        yield from getattr(action, "_get_subactions", list)()


def kept_line(line: str, width: int) -> list[str]:
    """Return a kept line and, behind three spaces or more, what it does; below it where one line is too short.

    A command, which stands four spaces in, can be pasted also where it takes several lines: each ends with a backslash.
    """
    if len(line) <= width:
        return [line]
    kept, *comments = re.split(r"(?<=\S) {3,}", line)
    whole = textwrap.TextWrapper(width - 2, subsequent_indent=INDENT, break_on_hyphens=False, break_long_words=False)
    *first, last = whole.wrap(kept)
    below = [textwrap.fill(words, width, initial_indent=INDENT, subsequent_indent=INDENT) for words in comments]
    goes_on = " \\" if line.startswith(" " * 4) else ""
    return [*(part + goes_on for part in first), last, *below]
