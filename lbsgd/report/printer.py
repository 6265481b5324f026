"""Prints in the width of the terminal, or in a given width to a file or a pipe."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from lbsgd.output import blaming_the_output
from lbsgd.report.lines import fitted, on_terminal
from lbsgd.units import harmless

HEIGHT = 25  # if TERM is dumb, rich ignores a width without a height


class Printer(Console):
    """A console of the terminal's width, or of `pipe_width` if there is no terminal."""

    def __init__(self, pipe_width: int):
        self.is_for_people = on_terminal()
        width, height = (None, None) if self.is_for_people else (pipe_width, HEIGHT)
        super().__init__(highlight=False, emoji=False, force_terminal=self.is_for_people, width=width, height=height)

    def render_str(self, text: str, **options: Any) -> Text:
        """Lay out the text as it will be written."""
        return super().render_str(self.written("\n".join(map(harmless, text.split("\n")))), **options)

    def written(self, text: str) -> str:
        """Return a text as the stream writes it: a stream that is not UTF-8 writes `eta` for η, which is wider."""
        errors = getattr(self.file, "errors", None) or "strict"
        return text.encode(self.encoding, errors).decode(self.encoding, errors)

    def wrapped(self, text: str, indent: int) -> str:
        """Wrap a text to the terminal's width, further lines indented. Without a terminal keep it in one line."""
        if not self.is_for_people:
            return text
        return fitted(text, self.width, indent)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does. Raises OutputError if the output cannot be written, as `output.say` does."""
        with blaming_the_output():
            super().print(*objects, **options)

    def on_broken_pipe(self) -> None:
        """Let `lbsgd` handle a closed pipe; rich would exit with code 1."""
        raise BrokenPipeError
