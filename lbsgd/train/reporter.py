"""Where the numbers of a run come together, and go: sums over training images, the run log and the screen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from lbsgd.report.run_log import RunLog
from lbsgd.train.progress import Progress

WAITING_PCT = 5.0  # of an epoch; more is worth a word


class Totals:
    """Sums over training images, kept on the device until somebody reads them."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # of the losses, of the errors, of the images

    def add(self, logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor) -> None:
        errors = (logits.argmax(1) != labels).sum().double()
        images = errors.new_full(
            (), len(labels)
        )  # filled on the device: a copy from the host would wait for all its work
        self.sums = self.sums + torch.stack([loss.double() * images, errors, images])

    def of_all(self, since: torch.Tensor | None = None) -> torch.Tensor:
        """Sums over all processes, less an earlier state of `sums`; all processes must call it."""
        sums = self.sums.clone() if since is None else self.sums - since
        dist.all_reduce(sums)
        return sums

    def read(self, since: torch.Tensor | None = None) -> tuple[float, float, int]:
        """Mean loss, error in %, number of images, less an earlier state of `sums`; all processes must call it."""
        loss, errors, images = self.of_all(since).tolist()
        return loss / images, 100 * errors / images, int(images)


@dataclass
class Reporter:
    """Where numbers go, on rank 0: the run log, the screen and, where the JSON asks for them, DeepSpeed's monitors."""

    log: RunLog
    progress: Progress
    threads: str = ""  # how many decode
    advised: bool = field(default=False, init=False)

    def __enter__(self) -> Reporter:
        self.progress.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.progress.__exit__(*error)
        self.log.close()

    def report(self, kind: str, record: dict[str, Any], engine) -> None:
        """A record of the log, of kind iteration or epoch."""
        getattr(self.log, kind)(record)
        getattr(self.progress, kind)(record)
        if engine.monitor.enabled:
            told_by_place = ("iteration", "num_iterations", "epoch")
            engine.monitor.write_events(
                [
                    (f"lbsgd/{name}", value, engine.global_samples)
                    for name, value in record.items()
                    if name not in told_by_place
                ]
            )

    def advise_on_waiting(self, waited_pct: float) -> None:
        """Says once what to change where an epoch's training waited for its images."""
        if waited_pct > WAITING_PCT and not self.advised:
            self.advised = True
            self.progress.say(
                f"warning: {waited_pct:.0f} % of the epoch's time went by waiting for data ({self.threads}): give more "
                "--loader_threads if cores are idle, --in_memory if the disk is slow, or convert with a smaller "
                "--max_side"
            )
