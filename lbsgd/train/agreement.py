"""Spread a request to one process, such as SIGTERM, to all processes after the same pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

AGREE_SECONDS = 0.25  # between agreements, at the speed of the passes so far


@dataclass(frozen=True)
class Decision:
    """What the processes agreed on: whether to stop, whether to save, and how long a pass takes on the slowest."""

    stop: bool = False
    save: bool = False
    pass_seconds: float = 0.0


class Asked:
    """The maximum of all processes' wishes, which a GPU computes while the host goes on."""

    def __init__(self, wishes: Sequence[float], device: torch.device):
        on_gpu = device.type == "cuda"
        # Pinned, because a copy from or to other host memory waits for all of the GPU's queued work.
        self.wishes = torch.tensor(wishes, dtype=torch.float64, pin_memory=on_gpu)
        largest = self.wishes.to(device, non_blocking=True)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        self.largest = torch.empty_like(self.wishes, pin_memory=on_gpu).copy_(largest, non_blocking=True)
        self.copied = torch.cuda.current_stream(device).record_event() if on_gpu else None
        self.saved_since = False

    def answer(self) -> Decision:
        if self.copied:
            self.copied.synchronize()
        stop, save, pass_seconds = self.largest.tolist()
        return Decision(bool(stop), bool(save) and not self.saved_since, pass_seconds)


class Agreement:
    """Collects the wishes of all processes every quarter of a second.

    Clocks differ between processes, so the time to the next agreement is given as a number of passes, which all count
    alike. A single process checks after every pass, which costs nothing.

    late: whether an answer is read only with the next question. This is the default on a GPU: the answer has long
    arrived by then, and the host need not wait.
    """

    def __init__(self, device: torch.device, late: bool | None = None):
        self.device = torch.device(device)
        self.late = self.device.type == "cuda" if late is None else late
        self.asked: Asked | None = None
        self.passes_to_next = 1
        self.restart()

    def restart(self) -> None:
        """Leave out the time between two epochs, in which no passes run."""
        self.passes, self.began = 0, time.monotonic()

    def after_pass(self, stop: bool, save: bool) -> Decision | None:
        """Return the processes' decision, or None between agreements. All processes must call this after each pass.

        stop, save: what this process wishes. One process's wish is enough.
        """
        self.passes += 1
        if self.passes < self.passes_to_next:
            return None
        wishes = float(stop), float(save), (time.monotonic() - self.began) / self.passes
        self.restart()
        if dist.get_world_size() == 1:
            return Decision(stop, save, wishes[2])
        return self.decide(wishes)

    def decide(self, wishes: Sequence[float]) -> Decision | None:
        """Ask all processes, and return the answer to this question or, if late, to the previous one."""
        asked = Asked(wishes, self.device)
        answered = self.asked if self.late else asked
        self.asked = asked
        if answered is None:
            return None
        decision = answered.answer()
        self.passes_to_next = max(1, int(AGREE_SECONDS / max(decision.pass_seconds, 1e-3)))
        return decision

    def saved(self, decision: Decision) -> Decision:
        """Note that all processes have saved. Return what is left of the decision."""
        if self.asked:
            self.asked.saved_since = True
        return replace(decision, save=False)
