"""Errors on the validation images, each counted once on one process (Sec. 5.1), with the statistics that serve it (Sec. 5.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from lbsgd.algorithm.batch_norm import agree_statistics, recomputing_statistics
from lbsgd.config.schema import BatchNorm


@torch.no_grad()
def evaluate(
    engine, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], alive: Callable[[str], None]
) -> dict[str, Any]:
    """Loss, top-1 and top-5 error in % and the whole numbers they come from; all processes must call it.

    batches: this process's share of the images. alive: told of each batch.
    """
    engine.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
    for number, (images, labels) in enumerate(batches):
        alive(f"evaluation, batch {number}")
        logits = engine(images).float()
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        sums += torch.stack(
            [
                F.cross_entropy(logits, labels, reduction="sum").double(),
                best[:, 0].sum().double(),
                best.sum().double(),
                sums.new_full((), len(labels)),
            ]
        )
    dist.all_reduce(sums)
    loss, top1, top5, images = sums.tolist()
    return {
        "val_loss": loss / images,
        "val_top1_error_pct": 100 * (1 - top1 / images),
        "val_top5_error_pct": 100 * (1 - top5 / images),
        "val_correct_top1": int(top1),
        "val_correct_top5": int(top5),
        "val_images": int(images),
    }


@torch.no_grad()
def settle_statistics(engine, norm: BatchNorm, train_data, epoch: int, alive: Callable[[str], None]) -> None:
    """Gives all processes the batch norm statistics that serve evaluation, checkpoint and export (Sec. 5.2)."""
    if norm.statistics != "recomputed":
        agree_statistics(engine.module)
        return
    engine.train()
    with recomputing_statistics(engine.module):
        for images in train_data.statistics_batches(epoch, norm.statistics_images, norm.per_worker_batch):
            alive("recomputing statistics")
            engine(images)
