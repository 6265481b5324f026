"""Random images instead of a data set, at the speed of the device: `--fake_data`.

An image depends only on the seed and its number. Images come from a small pool on the device, and images with the same
pixels have the same label, so a network can learn them.
"""

from __future__ import annotations

import numpy as np
import torch

from lbsgd.data.share import Batches, Cut, EvalData, Pixels, Share, TrainData

POOL_SIZE = 256


class _Pool:
    """POOL_SIZE random images on the device; image i of the data set is image i % POOL_SIZE of the pool."""

    def __init__(self, num_classes: int, seed: int, pixels: Pixels) -> None:
        shape = (POOL_SIZE, 3, pixels.resolution, pixels.resolution)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        self.num_classes = num_classes
        self.images = images.to(pixels.device, pixels.dtype, memory_format=pixels.memory_format)

    def batches(self, numbers: np.ndarray, batch: int) -> Batches:
        places = torch.from_numpy((numbers % POOL_SIZE).astype(np.int64)).to(self.images.device)
        for first in range(0, len(places), batch):  # split() would make a view for each batch of the epoch at once
            part = places[first : first + batch]
            yield self.images[part], part % self.num_classes


class FakeImages(TrainData):
    """num_images random training images, cut like `loaders.TrainLoader`'s."""

    def __init__(self, num_images: int, num_classes: int, cut: Cut, pixels: Pixels) -> None:
        super().__init__(num_images, cut)
        self._pool = _Pool(num_classes, cut.seed, pixels)

    def batches(self, numbers: np.ndarray, epoch: int) -> Batches:
        return self._pool.batches(numbers, self.cut.micro_batch)


class FakeEval(EvalData):
    """num_images of the same random images, shared like `loaders.EvalLoader`'s."""

    def __init__(
        self, num_images: int, num_classes: int, *, seed: int, batch: int, share: Share, pixels: Pixels
    ) -> None:
        super().__init__(num_images, share)
        self.batch = batch
        self._pool = _Pool(num_classes, seed, pixels)

    def __iter__(self) -> Batches:
        return self._pool.batches(self.numbers, self.batch)
