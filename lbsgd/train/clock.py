"""How long an epoch and its iterations take on this process, and how much of that is waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

Item = TypeVar("Item")


class Clock:
    """Two stopwatches: one for the epoch, one for the iterations since the last record (the window).

    The first wait of all is counted as part of the time and not as waiting: the loader starts and compiles then, and no
    advice about threads or disks would shorten it.
    """

    def __init__(self) -> None:
        self.started = False
        self.start_epoch()

    def start_epoch(self, seconds_before: float = 0.0) -> None:
        """Begin an epoch, or go on with one that took seconds_before already, before a restart."""
        self.epoch_began = time.perf_counter() - seconds_before
        self.epoch_waited = 0.0
        self.start_window()

    def start_window(self) -> None:
        """Begin what the next iteration record tells of."""
        self.window_began, self.window_waited = time.perf_counter(), 0.0

    def next_of(self, items: Iterator[Item]) -> Item:
        """Return the next item, and count the wait for it."""
        began = time.perf_counter()
        item = next(items)
        if self.started:
            self.add_wait(time.perf_counter() - began)
        self.started = True
        return item

    def add_wait(self, seconds: float) -> None:
        self.epoch_waited += seconds
        self.window_waited += seconds

    @property
    def epoch_seconds(self) -> float:
        return time.perf_counter() - self.epoch_began

    @property
    def window_seconds(self) -> float:
        return time.perf_counter() - self.window_began
