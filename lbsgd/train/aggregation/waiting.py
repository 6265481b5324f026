"""Measure how long training waits for aggregation, and in it for slower processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


class Waiting:
    """Counts the seconds between the end of back-propagation and the end of aggregation, since the last `take`.

    On a GPU two events per pass measure the time on the device. They are read later, so that the host does not wait.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = torch.device(device).type == "cuda"
        self.seconds = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, wrapped to count the time of each call."""

        @wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            began, events = time.perf_counter(), self.record()
            try:
                return function(*arguments, **options)
            finally:
                if events:
                    events[1].record()
                    self.events.append(events)
                    self.count_past()
                else:
                    self.seconds += time.perf_counter() - began

        return counted

    def record(self) -> tuple[torch.cuda.Event, torch.cuda.Event] | None:
        if not self.on_gpu:
            return None
        first, second = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        return first, second

    def count_past(self) -> None:
        """Count events that are over without waiting, so that events do not pile up if a loop never calls `take`."""
        while self.events and self.events[0][1].query():
            first, second = self.events.pop(0)
            self.seconds += first.elapsed_time(second) / 1e3

    def take(self) -> float:
        """Return the seconds and start from zero; waits for the GPU."""
        for first, second in self.events:
            second.synchronize()
            self.seconds += first.elapsed_time(second) / 1e3
        seconds, self.seconds, self.events = self.seconds, 0.0, []
        return seconds
