"""Decide which images a process takes and in which form; only this module cuts an epoch for a rank (Remark 4).

`TrainData` and `EvalData` choose the images by number. Their subclasses turn numbers into batches: `loaders.py` from
FFCV files, `coco_images.py` from COCO's images, `fake.py` from random images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from lbsgd.algorithm.shuffle import rank_batches, rank_groups, rank_share
from lbsgd.data.epoch_orders import host_order

# A classifier's batches: images (batch, 3, R, R) and labels int64 (batch,). A detector's are in `coco_images.py`.
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Share:
    """The images of one process among world_size processes."""

    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How epochs are cut for one process: shuffled by a seed, into updates and passes of these sizes."""

    seed: int
    global_batch: int
    micro_batch: int
    share: Share = Share()


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """The form of a batch of images: resolution x resolution pixels of dtype on the device, in a memory format."""

    resolution: int
    device: torch.device | str
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format


class TrainData(ABC):
    """One process's share of the training images, epoch by epoch.

    The images and their order depend on seed and epoch alone. World size and micro batch only cut them.
    An epoch may start at any iteration.
    """

    def __init__(self, num_images: int, cut: Cut) -> None:
        self.num_images, self.cut = num_images, cut

    def order(self, epoch: int) -> np.ndarray:
        """Return the images in the order that all ranks share: the epoch's one shuffle."""
        return host_order(self.num_images, self.cut.seed, epoch)

    @abstractmethod
    def batches(self, numbers: np.ndarray, epoch: int) -> Batches:
        """Yield the images of these numbers, as augmented in this epoch, in batches of micro_batch."""

    def close(self) -> None:  # noqa: B027  empty on purpose: only loaders have threads to end
        """End the threads of all iterators that have not reached their end."""

    def epoch(self, epoch: int, first_iteration: int = 0) -> Batches:
        """Yield the passes of this rank, accumulation_steps per iteration, from first_iteration to the epoch's end."""
        cut = self.cut
        numbers = rank_batches(
            self.order(epoch),
            global_batch=cut.global_batch,
            world_size=cut.share.world_size,
            micro_batch=cut.micro_batch,
            rank=cut.share.rank,
            first_iteration=first_iteration,
        )
        return self.batches(numbers.reshape(-1), epoch)

    def statistics_batches(self, epoch: int, num_images: int, per_worker_batch: int) -> Iterator[torch.Tensor]:
        """Yield the first num_images of the epoch, without labels, to recompute batch norm's statistics (Sec. 5.2).

        They come in whole groups of n = per_worker_batch images, as many groups at once as a micro batch holds. The
        groups are the same for any world size; each rank gets its share of them.
        """
        assert self.cut.micro_batch % per_worker_batch == 0
        groups = rank_groups(
            self.order(epoch),
            num_images=num_images,
            per_worker_batch=per_worker_batch,
            world_size=self.cut.share.world_size,
            rank=self.cut.share.rank,
        )
        return (images for images, _ in self.batches(groups.reshape(-1), epoch))


class EvalData(ABC):
    """One process's share of the validation images; all shares together hold each image exactly once.

    Iterating over it yields batches of (images, labels); the last batch may be smaller. A process without images yields
    nothing.
    """

    def __init__(self, num_images: int, share: Share) -> None:
        self.numbers = rank_share(num_images, world_size=share.world_size, rank=share.rank)

    @abstractmethod
    def __iter__(self) -> Batches: ...

    def close(self) -> None:  # noqa: B027  empty on purpose: only loaders have threads to end
        """End the threads of all iterators that have not reached their end."""
