"""Sums over the training images of an epoch, kept on the device until they are read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist


class Means(NamedTuple):
    """Means over images: the mean loss, the share of images in % for each count, and the number of images."""

    loss: float
    counts_pct: tuple[float, ...]
    num_images: int


class Totals:
    """Sums of the losses, of each count and of the images.

    `sums` has the shape (2 + counts,), in float64: losses first, images last. `mark` begins a second, shorter sum,
    which `read(since_mark=True)` returns.
    """

    def __init__(self, device: torch.device, num_counts: int):
        self.sums = torch.zeros(2 + num_counts, dtype=torch.float64, device=device)
        self.marked = self.sums

    def add(self, loss: torch.Tensor, counts: Sequence[torch.Tensor], num_images: int) -> None:
        """Add one pass: the mean loss of its images, and its counts."""
        # Filled on the device, because a copy from the host would wait for the device's work.
        images = self.sums.new_full((), num_images)
        self.sums = self.sums + torch.stack([loss.double() * images, *(count.double() for count in counts), images])

    def go_on(self, sums: torch.Tensor) -> None:
        """Continue from sums over all processes, as `of_all` returned them, and begin the shorter sum after them."""
        if dist.get_rank() == 0:
            self.sums = sums.to(self.sums.device)
        self.mark()

    def mark(self) -> None:
        """Begin the shorter sum here."""
        self.marked = self.sums

    def of_all(self, since_mark: bool = False) -> torch.Tensor:
        """Return the sums over all processes. All processes must call this."""
        sums = self.sums - self.marked if since_mark else self.sums.clone()
        dist.all_reduce(sums)
        return sums

    def read(self, since_mark: bool = False) -> Means:
        """Return the means over all processes' images, NaN without images. All processes must call this.

        There are no images in a checkpoint that an earlier version saved during an epoch's first iteration.
        """
        loss, *counts, images = self.of_all(since_mark).tolist()
        divisor = images or math.nan
        return Means(loss / divisor, tuple(100 * count / divisor for count in counts), int(images))
