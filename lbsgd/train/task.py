"""What a recipe gives the trainer: a network, the loss of one pass, and how it is evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from lbsgd.config.plan import Plan
from lbsgd.report.measure import Measure

Batch = Any  # what the run's images yield: images and labels for a classifier


class Task(Protocol):
    """What is trained. recipes/resnet50.py is the example. Every method is called on all processes.

    name         the network's name, for the log
    counts       names of what `loss` counts; "top1_error" becomes train_top1_error_pct in the log. May be empty
    judged_by    an evaluation's numbers by which log, screen and tables judge a run, most important first
    """

    name: str

    @property
    def counts(self) -> tuple[str, ...]: ...

    @property
    def judged_by(self) -> tuple[Measure, ...]: ...

    def network(self, num_classes: int, plan: Plan) -> torch.nn.Module:
        """Build the network, the same on every process."""
        ...

    def loss(self, network: Any, batch: Batch) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Return the mean loss of the pass's images and, for each of `counts`, the number of images that it counts.

        The trainer divides by the number of passes and takes the mean over the processes, so an update's loss is
        normalised by kn (Remark 3).
        """
        ...

    def evaluate(self, network: Any, batches: Iterable[Batch]) -> dict[str, Any]:
        """Return an evaluation's numbers for the log. `batches` are this process's share of the images.

        This runs in evaluation mode and without gradients. The numbers must include the key of each of `judged_by`. If
        one of those is NaN, the run has diverged.
        """
        ...
