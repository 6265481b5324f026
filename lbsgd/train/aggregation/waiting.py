"""How long training waits for aggregation, and for the slower processes in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


class Waiting:
    """Seconds between the end of back-propagation and that of aggregation, since they were last taken.

    On a GPU two events per pass measure it on the device, so that the host does not wait, and are read later.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = torch.device(device).type == "cuda"
        self.seconds = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, with the time that each call takes counted."""

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
        """Count events that are over, without a wait, so that a loop which never asks does not collect them."""
        while self.events and self.events[0][1].query():
            first, second = self.events.pop(0)
            self.seconds += first.elapsed_time(second) / 1e3

    def take(self) -> float:
        """Return the seconds, and begin anew; waits for the GPU."""
        for first, second in self.events:
            second.synchronize()
            self.seconds += first.elapsed_time(second) / 1e3
        seconds, self.seconds, self.events = self.seconds, 0.0, []
        return seconds
