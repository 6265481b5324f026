"""Fits --help to the width of the terminal."""

from __future__ import annotations

import re
import shutil
import textwrap
from argparse import PARSER, Action, HelpFormatter
from collections.abc import Generator
from functools import partial
from itertools import groupby
from typing import Any

INDENT = " " * 6  # of the further lines of a kept line
LEAST_WIDTH = 20  # letters, even on a terminal that is narrower or of unknown width

in_lines = partial(textwrap.wrap, break_on_hyphens=False)  # because a part of a name may be another name


class Help(HelpFormatter):
    """Fits help to the terminal: it fills paragraphs and items, and keeps each indented line, such as a command."""

    def __init__(self, prog: str, width: int | None = None, **layout: Any) -> None:
        columns = width or shutil.get_terminal_size().columns - 2  # as in argparse
        super().__init__(prog, width=max(columns, LEAST_WIDTH), **layout)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        by_kind = groupby(whole_lines(text).splitlines(), key=lambda line: line[:1] not in ("", " ", "*"))
        for is_paragraph, block in by_kind:
            if is_paragraph:
                lines += in_lines(" ".join(block), width)
            else:
                lines += [part for line in block for part in kept_line(line, width)]
        return "\n".join(indent + line for line in lines)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return in_lines(" ".join(text.split()), width)

    def _format_usage(self, *given: Any) -> str:
        """Break the alternatives of a group, too, which argparse keeps in one line."""
        lines = super()._format_usage(*given).split("\n")
        return "\n".join(part for line in lines for part in broken_usage(line, self._width))

    def _format_action(self, action: Action) -> str:
        """Leave out the line above the list of commands, which only repeats their heading."""
        said = super()._format_action(action)
        return said.partition("\n")[2] if action.nargs == PARSER else said

    def _iter_indented_subactions(self, action: Action) -> Generator[Action, None, None]:
        """List commands at the indent of flags, because argparse does not count a further indent in its columns."""
        yield from getattr(action, "_get_subactions", list)()


def whole_lines(text: str) -> str:
    """Return the text with each command, and each item of a list, in one line."""
    text = re.sub(r" *\\\n *", " ", text.strip())
    return re.sub(r"^\* .*(?:\n  \S.*)+", lambda item: re.sub(r"\n *", " ", item[0]), text, flags=re.MULTILINE)


def kept_line(line: str, width: int) -> list[str]:
    """Return a kept line in lines that fit. A comment, after three spaces or more, goes below if the line is too long.

    A command is indented by four spaces. Its lines end with a backslash if there are several, so that it can be pasted.
    """
    if len(line) <= width:
        return [line]
    if line.startswith("* "):
        return in_lines(line, width, subsequent_indent="  ")
    kept, *comments = re.split(r"(?<=\S) {3,}", line)
    *first, last = in_lines(kept, width - 2, subsequent_indent=INDENT, break_long_words=False)
    below = [part for words in comments for part in in_lines(INDENT + words, width, subsequent_indent=INDENT)]
    goes_on = " \\" if line.startswith(" " * 4) else ""
    return [*(part + goes_on for part in first), last, *below]


def broken_usage(line: str, width: int) -> list[str]:
    """Return a line of the usage in lines that fit."""
    indent = " " * (len(line) - len(line.lstrip()) + 1)  # inside its bracket
    return in_lines(line, width, subsequent_indent=indent, break_long_words=False) or [line]
