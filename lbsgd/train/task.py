"""What a recipe gives the trainer: a network, the loss of one pass, and how it is evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from lbsgd.config.plan import Plan
from lbsgd.report.measure import Measure

Batch = Any  # what the run's images yield: images and labels for a classifier


class Task(Protocol):
    """What is trained. recipes/resnet50.py is the example; every method is called on all processes.

    name         of the network, for the log
    counts       names of what `loss` counts; "top1_error" becomes train_top1_error_pct in the log. May be empty
    judged_by    the numbers of an evaluation that log, screen and tables judge a run by, the most important first
    """

    name: str
    counts: tuple[str, ...]
    judged_by: tuple[Measure, ...]

    def network(self, num_classes: int, plan: Plan) -> torch.nn.Module:
        """Build the network, the same one on every process."""
        ...

    def loss(self, network: Any, batch: Batch) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Return the mean loss of the pass's images and, for each of `counts`, the number of images that it is true of.

        The trainer divides by the number of passes and takes the mean over the processes, so the loss of an update is
        normalised by kn (Remark 3).
        """
        ...

    def evaluate(self, network: Any, batches: Iterable[Batch]) -> dict[str, Any]:
        """Return the numbers of an evaluation for the log; `batches` are this process's share of the images.

        Runs in evaluation mode and without gradients. The key of each of `judged_by` is among them; if one is NaN, the
        run has diverged.
        """
        ...
