"""Spreads a request to one process, such as SIGTERM, to all of them after the same pass."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

AGREE_SECONDS = 0.25  # between two agreements, at the speed of the passes so far


@dataclass(frozen=True)
class Decision:
    """What the processes agreed on: to stop, to save a checkpoint, and how long a pass takes on the slowest of them."""

    stop: bool = False
    save: bool = False
    pass_seconds: float = 0.0


class Agreement:
    """Collects the wishes of all processes every quarter of a second.

    Clocks differ between processes, so the next agreement comes a number of passes later, which all of them count
    alike. A process alone looks after each pass, which costs nothing.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.passes_to_next = 1
        self.restart()

    def restart(self) -> None:
        """Leave out the time between two epochs, in which no passes run."""
        self.passes, self.began = 0, time.monotonic()

    def after_pass(self, stop: bool, save: bool) -> Decision | None:
        """Return the decision of all processes, or None between two agreements; all must call it after each pass.

        stop, save: what this process wishes. One process that wishes is enough.
        """
        self.passes += 1
        if self.passes < self.passes_to_next:
            return None
        wishes = [float(stop), float(save), (time.monotonic() - self.began) / self.passes]
        if dist.get_world_size() > 1:
            largest = torch.tensor(wishes, dtype=torch.float64, device=self.device)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            wishes = largest.tolist()
            self.passes_to_next = max(1, int(AGREE_SECONDS / max(wishes[2], 1e-3)))
        self.restart()
        return Decision(bool(wishes[0]), bool(wishes[1]), wishes[2])
