"""Measure how long an epoch and its iterations take on this process, and how much of that is waiting."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


class HostEvent:
    """Replaces torch.cuda.Event on a CPU, where all work is done when Python goes on."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: HostEvent) -> float:
        return 1e3 * (end.at - self.at)


def events_of(device: torch.device | str) -> Callable[[], Any]:
    """Return the function that makes events in a device's queue."""
    if torch.device(device).type == "cuda":
        return lambda: torch.cuda.Event(enable_timing=True)
    return HostEvent


class Waits:
    """The seconds that a device waits, for data or for aggregation.

    The host queues one event before and one after a wait, and the device's time between the two counts. If the host
    waits for data, this is 0 if the device has enough work meanwhile, else the rest of the wait. It includes the short
    copies that the wait itself queues: of labels, and of a detector's images. Nothing waits for the events. They are
    read once they have happened, and then reused.
    """

    def __init__(self, event: Callable[[], Any]):
        self.event, self.seconds = event, 0.0
        self.pairs: deque[tuple[Any, Any]] = deque()
        self.spare: list[Any] = []
        self.start_epoch()

    def start_epoch(self) -> None:
        """Start counting for an epoch and for its first window."""
        self.before_epoch = self.read()
        self.start_window()

    def start_window(self) -> None:
        self.before_window = self.read()

    @property
    def of_epoch(self) -> float:
        return self.read() - self.before_epoch

    @property
    def of_window(self) -> float:
        return self.read() - self.before_window

    def queue(self) -> Any:
        event = self.spare.pop() if self.spare else self.event()
        event.record()
        return event

    def add(self, began: Any) -> None:
        """Add the wait that began with an event and ends now."""
        self.pairs.append((began, self.queue()))
        self.read()  # so that few are kept, even if nothing else reads

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, wrapped to count each call as a wait."""

        @wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            began = self.queue()
            try:
                return function(*arguments, **options)
            finally:
                self.add(began)

        return counted

    def read(self) -> float:
        """Return the seconds of all waits that are over on the device."""
        while self.pairs and self.pairs[0][1].query():
            began, ended = self.pairs.popleft()
            self.seconds += began.elapsed_time(ended) / 1e3
            self.spare += began, ended
        return self.seconds


class Clock:
    """Two stopwatches: one for the epoch, one for the iterations since the last record (the window).

    data, aggregation    the waits for them, in both stopwatches. The first wait for data counts as time but not as
                         waiting: the loader starts and compiles then, and no advice about threads or disks would
                         shorten it. The waits are known once the host has waited for the device, as before a record
    """

    def __init__(self, event: Callable[[], Any] = HostEvent, aggregation: Waits | None = None) -> None:
        self.started, self.data, self.aggregation = False, Waits(event), aggregation or Waits(event)
        self.start_epoch()

    def start_epoch(self, seconds_before: float = 0.0) -> None:
        """Begin an epoch, or continue one that had taken seconds_before when the run was restarted."""
        self.seconds_before = seconds_before
        self.window_began = self.epoch_began = time.perf_counter()
        self.data.start_epoch()
        self.aggregation.start_epoch()

    def start_window(self) -> None:
        """Begin the next iteration record's window."""
        self.window_began = time.perf_counter()
        self.data.start_window()
        self.aggregation.start_window()

    def next_of(self, items: Iterator[Item]) -> Item:
        """Return the next item and count the wait for it."""
        began = self.data.queue()
        item = next(items)
        if self.started:
            self.data.add(began)
        self.started = True
        return item

    @property
    def epoch_seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.epoch_began

    @property
    def window_seconds(self) -> float:
        return time.perf_counter() - self.window_began
