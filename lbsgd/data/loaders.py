"""Load images by number from an FFCV file as normalised batches on the device (Sec. 5.1)."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator

import numba
import numpy as np
import torch

from lbsgd.data.beton import BetonFile
from lbsgd.data.crops import centre_crop, crop_key, random_resized_crop
from lbsgd.data.ffcv_loader import CropDecoder, CropPipeline, DecodingThread
from lbsgd.data.read_ahead import Chosen, ReadAhead
from lbsgd.data.share import Batches, Cut, EvalData, Pixels, Share, TrainData
from lbsgd.data.to_device import Prefetcher, array_on_device
from lbsgd.errors import ConfigError

BATCHES_OF_LABELS = 256


class DecodedImages:
    """The images of one file, cropped by `draw` (see crops.py) and put on the device in batches.

    threads is the number of threads that decode. from_disk asks the disk for images ahead of the threads, for a file
    that does not fit into memory. Raises ConfigError for a number of threads that this process cannot have, and
    DataError for an unusable file.
    """

    def __init__(
        self,
        beton: BetonFile | str | os.PathLike,
        draw: Callable,
        *,
        batch: int,
        pixels: Pixels,
        threads: int,
        from_disk: bool,
    ) -> None:
        most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]  # set when Numba is imported
        if not 1 <= threads <= most:
            raise ConfigError(
                f"{threads} loader threads are not possible: this process can use 1 to {most}; give --loader_threads"
            )
        self.beton = beton if isinstance(beton, BetonFile) else BetonFile.open(beton)
        self.batch, self.device, self.from_disk = batch, pixels.device, from_disk
        self._prefetcher = Prefetcher(pixels)
        self.pipeline = CropPipeline(self.beton, CropDecoder(pixels.resolution, draw), batch=batch, threads=threads)
        self._threads: set[DecodingThread] = set()

    def batches(self, numbers: np.ndarray, key: np.uint64) -> Batches:
        """Yield the images of these numbers, with crops drawn from the key."""
        if len(numbers) == 0:
            return
        self.beton.require_unchanged()
        read_ahead = None
        if self.from_disk:
            starts, sizes = Chosen(self.beton.images["data_at"], numbers), Chosen(self.beton.sizes, numbers)
            read_ahead = ReadAhead(self.beton.path, starts, sizes)
        thread = DecodingThread(self.pipeline, numbers, key, read_ahead)
        self._threads.add(thread)
        # If a program ends within an epoch, Python stops the thread, perhaps with a lock that close would wait for.
        atexit.register(thread.close)
        try:
            yield from zip(self._prefetcher(thread), self._labels(numbers), strict=True)
        finally:
            thread.close()
            atexit.unregister(thread.close)
            self._threads.discard(thread)

    def _labels(self, numbers: np.ndarray) -> Iterator[torch.Tensor]:
        """Yield the labels in batches. Each copy to the device takes many batches, but not a whole epoch."""
        several = self.batch * BATCHES_OF_LABELS
        for first in range(0, len(numbers), several):
            labels = self.beton.labels[numbers[first : first + several]]
            yield from array_on_device(labels, self.device).split(self.batch)

    def close(self) -> None:
        for thread in list(self._threads):
            thread.close()


class TrainLoader(TrainData):
    """One rank's share of the training images, augmented (Sec. 5.1).

    Images come as (micro_batch, 3, resolution, resolution) in the pixels' dtype, labels as int64, both on the device.
    Crops depend on (seed, epoch, image) alone, so threads, world size, micro batch and restarts change no pixel.
    """

    def __init__(
        self,
        beton: BetonFile | str | os.PathLike,
        cut: Cut,
        *,
        pixels: Pixels,
        threads: int,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        flip: bool = True,
        from_disk: bool = False,
    ) -> None:
        draw = random_resized_crop(crop_scale, flip)
        self.images = DecodedImages(
            beton, draw, batch=cut.micro_batch, pixels=pixels, threads=threads, from_disk=from_disk
        )
        super().__init__(self.images.beton.num_images, cut)

    def batches(self, numbers: np.ndarray, epoch: int) -> Batches:
        return self.images.batches(numbers, crop_key(self.cut.seed, epoch))

    def close(self) -> None:
        self.images.close()


class EvalLoader(EvalData):
    """One rank's share of the validation images, as centre crops in batches of `batch`."""

    def __init__(
        self,
        beton: BetonFile | str | os.PathLike,
        *,
        batch: int,
        share: Share,
        pixels: Pixels,
        threads: int,
        from_disk: bool = False,
    ) -> None:
        self.images = DecodedImages(
            beton, centre_crop, batch=batch, pixels=pixels, threads=threads, from_disk=from_disk
        )
        super().__init__(self.images.beton.num_images, share)

    def __iter__(self) -> Batches:
        return self.images.batches(self.numbers, np.uint64(0))

    def close(self) -> None:
        self.images.close()
