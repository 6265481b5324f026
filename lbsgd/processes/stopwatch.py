"""Measure how long the parts of a start take, from the command to the first update."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

LONG_SECONDS = 20.0  # a longer start is reported in a line


class Stopwatch:
    """A stopwatch that has run since the outermost launcher began. Each part is named when it is over.

    The time before this object is made belongs to the launcher and to Python; the processes' start times tell it.
    torchrun's time is left out, because it restarts processes after a death, and the training before is not a start.
    """

    def __init__(self, launchers: Sequence[psutil.Process] = ()) -> None:
        self.parts: list[tuple[str, float]] = []
        self.last = psutil.Process().create_time()
        outermost = () if os.environ.get("TORCHELASTIC_RUN_ID") else launchers[-1:]
        with suppress(psutil.Error):  # it has ended, as the guard will notice
            self.parts += [("launcher", self.last - launcher.create_time()) for launcher in outermost]
        self.lap("Python")

    def lap(self, part: str) -> None:
        """Name the part that has just ended. It began when the previous part ended."""
        now = time.time()
        self.parts.append((part, now - self.last))
        self.last = now

    def line(self) -> str | None:
        """Return how long each part took, None if the start took at most LONG_SECONDS."""
        total = sum(seconds for _, seconds in self.parts)
        if total <= LONG_SECONDS:
            return None
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts)
        return f"{total:.0f} s to the first update: {parts}"
