"""Lines of words that a terminal does not break inside a word; a file or a pipe gets each in one piece."""

from __future__ import annotations

import shutil
import sys
import textwrap

from lbsgd.disk import say

NAME_WIDTH = 15  # letters of the column before a fact
LEAST_WIDTH = 20  # of wrapped text


def on_terminal() -> bool:
    """Return whether a person reads; FORCE_COLOR, which build servers set, makes rich take a file for a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


def fact(name: str, value: object) -> str:
    """Return a name and what there is to say of it, in two columns."""
    return f"{name:{NAME_WIDTH}}{value}"


def say_fact(name: str, value: object) -> None:
    """Print a name and what there is to say of it. Raises OutputError."""
    say(on_width(fact(name, value), NAME_WIDTH))


def warn(text: str) -> None:
    """Print what is doubtful. Raises OutputError."""
    say(on_width(f"warning: {text}"))


def on_width(text: str, indent: int = 2) -> str:
    """Return a text in the terminal's width, further lines indented; as it is where stdout is no terminal."""
    if not on_terminal():
        return text
    return fitted(text, shutil.get_terminal_size().columns, indent)


def fitted(text: str, width: int, indent: int) -> str:
    """Return a text in lines of a width, broken between words, further lines indented; as it is where it fits."""
    if len(text) <= width:
        return text
    return textwrap.fill(
        text,
        max(indent + LEAST_WIDTH, width),
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
