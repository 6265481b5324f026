"""Prints lines that a terminal wraps only between words. A file or a pipe gets each line unwrapped."""

from __future__ import annotations

import shutil
import sys
import textwrap

from lbsgd.output import say
from lbsgd.units import harmless

NAME_WIDTH = 15  # letters of the column before a fact
LEAST_WIDTH = 20  # of wrapped text


def on_terminal() -> bool:
    """Return whether stdout is a terminal. rich cannot tell: with FORCE_COLOR, as on build servers, it says yes."""
    return sys.stdout is not None and sys.stdout.isatty()


def fact(name: str, value: object) -> str:
    """Return a name and its value in two columns."""
    return f"{name:{NAME_WIDTH}}{value}"


def say_fact(name: str, value: object) -> None:
    """Print a name and its value. Raises OutputError."""
    _say_on_width(fact(name, value), NAME_WIDTH)


def warn(text: str) -> None:
    """Print a warning. Raises OutputError."""
    _say_on_width(f"warning: {text}")


def _say_on_width(line: str, indent: int = 2) -> None:
    say(*on_width(harmless(line), indent).split("\n"))  # a line end in a name begins no line


def on_width(text: str, indent: int = 2) -> str:
    """Wrap a text to the terminal's width, further lines indented. Leave it as it is if stdout is no terminal."""
    if not on_terminal():
        return text
    return fitted(text, shutil.get_terminal_size().columns, indent)


def fitted(text: str, width: int, indent: int) -> str:
    """Wrap a text between words to a width, further lines indented. Leave it as it is if it fits."""
    if len(text) <= width:
        return text
    return textwrap.fill(
        text,
        max(indent + LEAST_WIDTH, width),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
