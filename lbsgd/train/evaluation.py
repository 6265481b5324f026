"""Errors on the validation images, each image counted once (Sec. 5.1), and the statistics for them (Sec. 5.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from lbsgd.algorithm.batch_norm_statistics import agree_statistics, recomputing_statistics
from lbsgd.config.schema import BatchNorm
from lbsgd.processes.ending import from_rank_0
from lbsgd.report.measure import LAST_EPOCHS, Measure
from lbsgd.train.compiled import as_it_is
from lbsgd.train.returned import require_evaluation
from lbsgd.train.task import Batch, Task


@torch.no_grad()
def evaluate(
    engine,
    task: Task,
    batches: Iterable[Batch],
    alive: Callable[[str], None],
    among: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return the task's evaluation. All processes must call this.

    batches: this process's share of the images. alive: called for each batch. among: the classes that the network may
    answer with, by default all.
    """
    engine.eval()
    with as_it_is(engine.module), answering_among(among, engine.module):
        return require_evaluation(task.evaluate(engine, watched(batches, alive)), task)


@contextmanager
def answering_among(classes: Sequence[int] | None, network: torch.nn.Module) -> Iterator[None]:
    """Let a classifier answer only with some of its classes: inside, the logits of all others are -inf.

    So a network of 5,000 classes is judged like one of the 1,000 that validation images have (ImageNet-5k, Sec. 5.3).
    """
    if classes is None:
        yield
        return
    kept = torch.tensor(classes, device=next(network.parameters()).device)  # copied once, not for each batch

    def others_left_out(_network, _images, logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -torch.inf).index_copy(1, kept, logits.index_select(1, kept))

    with network.register_forward_hook(others_left_out):
        yield


def without_number(found: Mapping[str, Any], judged_by: Sequence[Measure]) -> str | None:
    """Return the first measure whose value is not a number on rank 0, which logs it. All processes must call this."""
    broken = (measure.name for measure in judged_by if not math.isfinite(found.get(measure.key) or 0))
    return from_rank_0(lambda: next(broken, None))


def is_due(epoch: float, last: float, every: int, judged_by: Sequence[Measure]) -> bool:
    """Whether to evaluate an epoch of a run that ends at `last`: multiples of `every`, and all that judge the run."""
    counted = LAST_EPOCHS if any(measure.of_run == "median" for measure in judged_by) else 0
    return epoch % every == 0 or epoch >= last or epoch > last - counted


def watched(batches: Iterable[Batch], alive: Callable[[str], None]) -> Iterator[Batch]:
    for number, batch in enumerate(batches):
        alive(f"evaluation, batch {number}")
        yield batch


def over_all_processes(sums: torch.Tensor) -> list[float]:
    """Return the sums over all processes. All processes must call this."""
    dist.all_reduce(sums)
    return sums.tolist()


@torch.no_grad()
def sync_batch_norm_statistics(engine, norm: BatchNorm, images, epoch: int, alive: Callable[[str], None]) -> None:
    """Give all processes the same batch norm statistics for evaluation, checkpoint and export (Sec. 5.2).

    images: the training images. If the plan says so, the statistics are recomputed from some of them.
    """
    if norm.statistics != "recomputed":
        agree_statistics(engine.module)
        return
    engine.train()
    with recomputing_statistics(engine.module), as_it_is(engine.module):
        for batch in images.statistics_batches(epoch, norm.statistics_images, norm.per_worker_batch):
            alive("recomputing statistics")
            engine(batch)
