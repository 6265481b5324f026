"""The converter's progress: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from lbsgd.output import blaming_the_output, say
from lbsgd.units import duration

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_SECONDS = 30
WIDE = 80  # columns that hold the whole bar


class Meter:
    """Counts images, failed images and bytes in the source; estimates the time left from the bytes."""

    def __init__(
        self, title: str, num_images: int, num_bytes: int, *, done: int = 0, done_bytes: int = 0, failed: int = 0
    ) -> None:
        self.title, self.num_images, self.num_bytes, self.failed = title, num_images, num_bytes, failed
        self.first, self.first_bytes = self.done, self.done_bytes = done, done_bytes
        self.start = self._line_at = time.monotonic()
        self._bar = _bar(title, num_bytes, done_bytes) if sys.stdout.isatty() else None
        if self._bar:
            self._show(self._bar)
        if done:
            self.say(f"{title}: goes on after {done:,} of {num_images:,} images{self.failures()}")

    def __enter__(self) -> Meter:
        if self._bar:
            with blaming_the_output():
                self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            with blaming_the_output():
                self._bar.stop()

    def advance(self, images: int, num_bytes: int, failed: int = 0) -> None:
        self.done += images
        self.done_bytes += num_bytes
        self.failed += failed
        if self._bar:
            self._show(self._bar)
        elif time.monotonic() - self._line_at >= LINE_SECONDS:
            self._line_at = time.monotonic()
            images_done = f"{self.done:,} of {self.num_images:,} images{self.failures()}"
            self.say(f"{self.title}: {images_done}, {self.speed()}, {duration(self.left())} left")

    def _show(self, bar: Progress) -> None:
        width = len(f"{self.num_images:,}")
        left = f"{duration(self.left()):>6} left" if self.done > self.first else ""
        images = f"{self.done:>{width},} of {self.num_images:,}{self.failures()}"
        bar.update(
            bar.task_ids[0], completed=self.done_bytes, speed=self.speed() if left else "", left=left, images=images
        )

    def failures(self) -> str:
        """Return `, 3 failed`, empty if there are none."""
        return f", {self.failed:,} failed" if self.failed else ""

    def seconds(self) -> float:
        return max(time.monotonic() - self.start, 1e-9)

    def left(self) -> float:
        """Return the seconds left at the speed so far."""
        return self.seconds() * (self.num_bytes - self.done_bytes) / max(self.done_bytes - self.first_bytes, 1)

    def speed(self) -> str:
        images_per_second = (self.done - self.first) / self.seconds()
        megabytes_per_second = (self.done_bytes - self.first_bytes) / self.seconds() / 1e6
        return f"{images_per_second:,.0f} images/s, {megabytes_per_second:,.1f} MB/s"

    def say(self, line: str) -> None:
        with blaming_the_output():
            (self._bar.console.print if self._bar else say)(line)


def _bar(title: str, num_bytes: int, done_bytes: int) -> Progress | None:
    """Return a bar that disappears when it stops, to make way for the result. None if the terminal cannot draw it."""
    import rich
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    names = ("images", "speed", "left") if rich.get_console().width >= WIDE else ("images", "left")
    words = [TextColumn(f"{{task.fields[{name}]}}", table_column=Column(no_wrap=True)) for name in names]
    wide = BarColumn(bar_width=None, table_column=Column(ratio=1))
    bar = Progress(TextColumn("{task.description}"), wide, *words, refresh_per_second=4, transient=True, expand=True)
    bar.add_task(title, total=max(num_bytes, 1), completed=done_bytes, images="", speed="", left="")
    return bar if bar.console.is_interactive else None
