"""The shared shuffle of Remark 4 as a sampler for torch's DataLoader, with any data set."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import Sampler

from lbsgd.algorithm import process_group
from lbsgd.algorithm.shuffle import epoch_order, rank_batches
from lbsgd.errors import require_number


@dataclass
class Pass:
    """One pass through an epoch's batches: its first update, and the number of batches taken from it."""

    first_update: int
    earlier: int  # batches that the sampler gave in passes before this one
    given: int = 0


class SharedShuffleSampler(Sampler[list[int]]):
    """This process's micro batches of each epoch, for a DataLoader's batch_sampler (Remark 4).

        sampler = SharedShuffleSampler(len(dataset), global_batch=256, micro_batch=32, seed=0)
        loader = DataLoader(dataset, batch_sampler=sampler)
        for epoch in range(90):
            sampler.set_epoch(epoch)            # else every epoch is the same; first_iteration starts in mid-epoch
            for images, labels in loader: ...   # accumulation_steps batches of micro_batch images per iteration

    All processes cut the same permutation, drawn from (seed, epoch). Iteration t takes its images t·kn ... (t+1)·kn,
    the same set for any number of processes. No image comes twice in an epoch, and there is no padding. By default
    world_size and rank come from torch.distributed, or are 1 and 0 without it. Raises ValueError if global_batch is not
    a multiple of world_size · micro_batch, if rank is not below world_size, or is missing beside a world_size that is
    not torch.distributed's, if the images do not fill one global batch, or if a launcher has started several processes,
    but they have no process group.
    """

    watched = False  # whether set_epoch was called, or `parts_for` watches whether it is

    def __init__(
        self,
        num_images: int,
        *,
        global_batch: int,
        micro_batch: int,
        seed: int = 0,
        world_size: int | None = None,
        rank: int | None = None,
    ) -> None:
        given = {"num_images": num_images, "global_batch": global_batch, "micro_batch": micro_batch, "seed": seed}
        given |= {} if world_size is None else {"world_size": world_size}
        given |= {} if rank is None else {"rank": rank}
        for name, number in given.items():
            require_number(number, name, whole=True)
        if num_images < global_batch:
            raise ValueError(
                f"{num_images} images do not fill one global batch of {global_batch}, so no epoch has an iteration;"
                " give more images or a smaller global_batch"
            )
        if world_size == 1 and rank is None:
            rank = 0
        if world_size is None or rank is None:
            process_group.require_met()
        if rank is None and world_size not in (None, 0, process_group.world_size()):
            raise ValueError(f"world_size is {world_size}, and no rank is given: give rank, from 0 to {world_size - 1}")
        self.num_images, self.seed = num_images, seed
        self.cut = dict(
            global_batch=global_batch,
            micro_batch=micro_batch,
            world_size=world_size if world_size is not None else process_group.world_size(),
            rank=rank if rank is not None else process_group.rank(),
        )
        self.begun: Pass | None = None
        self.given = 0  # batches given in all passes
        self.set_epoch(0)
        self.watched = False

    def set_epoch(self, epoch: int, first_iteration: int = 0) -> None:
        """Choose the next epoch, from first_iteration on. Raises ConfigError for numbers that are not whole."""
        require_number(epoch, "epoch", whole=True)
        require_number(first_iteration, "first_iteration", whole=True)
        order = epoch_order(self.num_images, self.seed, epoch)
        batches = rank_batches(order, first_iteration=first_iteration, **self.cut)
        self.batches = batches.reshape(-1, self.cut["micro_batch"])
        per_epoch = self.num_images // self.cut["global_batch"]
        self.next_update, self.announced = epoch * per_epoch + first_iteration, True
        self.watched = True

    @property
    def sampler(self) -> SharedShuffleSampler:
        """Return itself: Lightning tells the epoch to a batch sampler's sampler, not to the batch sampler."""
        return self

    def __iter__(self) -> Iterator[list[int]]:
        if not self.watched and self.begun is not None and self.begun.given == len(self):
            self.watched = True
            if self.cut["rank"] == 0:
                warnings.warn(
                    "lbsgd: a sampler gives the batches of epoch 0 again, in the same order; call"
                    " sampler.set_epoch(epoch) before each epoch of training",
                    stacklevel=2,
                )
        batches = self.batches.tolist()  # of the epoch set by the time of the first batch; Lightning sets it late
        self.begun = begun = Pass(self.next_update, self.given)
        for batch in batches:
            begun.given += 1
            self.given += 1
            yield batch

    def __len__(self) -> int:
        return len(self.batches)
