"""Random images in place of a data set, at the device's speed: `--fake_data`.

The loaders' interface, the same shuffle, and images that depend on the seed and their number alone. They come from a
small pool on the device, and images with the same pixels have the same label, so that a network can learn them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from lbsgd.algorithm.shuffle import epoch_order, rank_batches, rank_groups, rank_share

POOL_SIZE = 256

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


class _Fake:
    def __init__(
        self,
        num_images: int,
        num_classes: int,
        *,
        seed: int,
        batch: int,
        resolution: int,
        device: torch.device | str,
        dtype: torch.dtype,
        channels_last: bool,
    ) -> None:
        self.num_images, self.num_classes, self.seed, self.batch = num_images, num_classes, seed, batch
        pool = torch.randn(POOL_SIZE, 3, resolution, resolution, generator=torch.Generator().manual_seed(seed))
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._pool = pool.to(device, dtype, memory_format=memory_format)

    def close(self) -> None:
        """As of the loaders, which have threads to end."""

    def _batches(self, images: np.ndarray) -> Batches:
        entries = torch.from_numpy(images % POOL_SIZE).to(self._pool.device)
        for batch in entries.split(self.batch) if len(entries) else ():
            yield self._pool[batch], batch % self.num_classes


class FakeImages(_Fake):
    """TrainLoader's interface over num_images random images."""

    def __init__(
        self,
        num_images: int,
        num_classes: int,
        *,
        seed: int,
        global_batch: int,
        world_size: int,
        rank: int,
        micro_batch: int,
        resolution: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        super().__init__(
            num_images,
            num_classes,
            seed=seed,
            batch=micro_batch,
            resolution=resolution,
            device=device,
            dtype=dtype,
            channels_last=channels_last,
        )
        self.global_batch, self.world_size, self.rank = global_batch, world_size, rank

    def epoch(self, epoch: int, first_iteration: int = 0) -> Batches:
        images = rank_batches(
            epoch_order(self.num_images, self.seed, epoch),
            global_batch=self.global_batch,
            world_size=self.world_size,
            micro_batch=self.batch,
            rank=self.rank,
            first_iteration=first_iteration,
        )
        return self._batches(images.reshape(-1))

    def statistics_batches(self, epoch: int, num_images: int, per_worker_batch: int) -> Iterator[torch.Tensor]:
        assert self.batch % per_worker_batch == 0
        groups = rank_groups(
            epoch_order(self.num_images, self.seed, epoch),
            num_images=num_images,
            per_worker_batch=per_worker_batch,
            world_size=self.world_size,
            rank=self.rank,
        )
        return (images for images, _ in self._batches(groups.reshape(-1)))


class FakeEval(_Fake):
    """EvalLoader's interface over num_images of the same random images."""

    def __init__(
        self,
        num_images: int,
        num_classes: int,
        *,
        seed: int,
        world_size: int,
        rank: int,
        batch: int,
        resolution: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        super().__init__(
            num_images,
            num_classes,
            seed=seed,
            batch=batch,
            resolution=resolution,
            device=device,
            dtype=dtype,
            channels_last=channels_last,
        )
        self.share = rank_share(num_images, world_size=world_size, rank=rank)

    def __iter__(self) -> Batches:
        return self._batches(self.share)
