"""How long the parts of a start take, from the command to the first update."""

from __future__ import annotations

import time
from collections.abc import Sequence

import psutil

LONG_SECONDS = 20.0  # a start that takes longer deserves a line


class Stopwatch:
    """A stopwatch that runs since the outermost launcher began; each part is named when it is over.

    The time before this object is made belongs to the launcher and to Python, which the system's clock tells apart.
    """

    def __init__(self, launchers: Sequence[psutil.Process] = ()) -> None:
        self.parts: list[tuple[str, float]] = []
        self.last = began = psutil.Process().create_time()
        for launcher in launchers[-1:]:
            try:
                began = launcher.create_time()
            except psutil.Error:  # it has ended, which the guard will notice
                break
            self.parts.append(("launcher", self.last - began))
        self.lap("Python")

    def lap(self, part: str) -> None:
        """Name what has been going on since the part before it."""
        now = time.time()
        self.parts.append((part, now - self.last))
        self.last = now

    def line(self) -> str | None:
        """Return what took how long; None if the start was no longer than LONG_SECONDS."""
        total = sum(seconds for _, seconds in self.parts)
        if total <= LONG_SECONDS:
            return None
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts)
        return f"start          {total:.0f} s to the first update: {parts}"
