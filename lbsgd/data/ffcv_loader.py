"""FFCV pipelines over `shuffle`: numbers of images in, normalised images on the device out (Sec. 5.1, Remark 4).

FFCV decodes in threads of its own, without Python. Three things that it does not do are done here: the crop and flip of
an image depend on (seed, epoch, image) alone, and so not on threads, batches, processes and restarts; an epoch may
start anywhere; a failure in its thread ends the training instead of stopping it for ever.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from queue import Empty

import numba
import numpy as np
import torch

from lbsgd.algorithm.sampler import SharedShuffleSampler
from lbsgd.algorithm.shuffle import epoch_order, rank_batches, rank_groups, rank_share
from lbsgd.data.beton import BetonFile
from lbsgd.data.crops import centre_crop, crop_key, random_resized_crop
from lbsgd.data.native.kernels import Crops, ffcv_crops, library, our_crops
from lbsgd.data.read_ahead import ReadAhead
from lbsgd.data.to_device import Prefetcher
from lbsgd.errors import ConfigError, DataError

_torch_threads = torch.get_num_threads()
from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder  # noqa: E402
from ffcv.libffcv import imdecode, resize_crop  # noqa: E402
from ffcv.loader import Loader, OrderOption  # noqa: E402
from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from ffcv.memory_managers import OSCacheManager  # noqa: E402
from ffcv.pipeline.allocation_query import AllocationQuery  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.traversal_order.base import TraversalOrder  # noqa: E402

torch.set_num_threads(_torch_threads)

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]

# --- two of FFCV's habits, changed ------------------------------------------------------------------------------------


def _set_num_threads(threads: int) -> None:
    """FFCV's own sets torch's threads as well, on import, in each loader and in each epoch's thread.

    Sums over another number of threads differ in their last bits, so torch's number is kept out of it.
    """
    Compiler.num_threads = threads
    numba.set_num_threads(threads)


def _compile_reader(self: OSCacheManager) -> Callable:
    """FFCV's own makes Numba's type of byte arrays read-only, and so breaks what is compiled for that type already."""

    def read(address, file):
        content, addresses, sizes = file
        return content[address : address + sizes[np.searchsorted(addresses, address)]]

    return Compiler.compile(read)


Compiler.set_num_threads = _set_num_threads
OSCacheManager.compile_reader = _compile_reader

# --- FFCV's part: an operation, and the thread that runs it -----------------------------------------------------------


def crops() -> Crops:
    kernels = library()
    return our_crops(kernels) if kernels else ffcv_crops(Compiler.compile(imdecode), Compiler.compile(resize_crop))


class CropDecoder(SimpleRGBImageDecoder):
    """Decodes the box of an image that `draw` (of crops.py) chooses and resizes it to resolution x resolution pixels.

    Compiled code takes what surrounds it for constants, so the epoch's key comes in by memory, and what was found damaged
    goes out by it: FFCV gives each row of a batch the memory that an operation asks for, here the row's pixels, its key, and
    the number of its image where that is damaged, else -1.
    """

    def __init__(self, resolution: int, draw: Callable) -> None:
        super().__init__()
        self.resolution, self.draw = resolution, draw

    def declare_state_and_memory(self, previous_state):
        shape, dtype = (self.resolution, self.resolution, 3), np.dtype("u1")
        return (
            replace(previous_state, jit_mode=True, shape=shape, dtype=dtype),
            (AllocationQuery(shape, dtype), AllocationQuery((2,), np.dtype("i8"))),
        )

    def generate_code(self) -> Callable:
        read, draw, jpeg, (crop_jpeg, crop_pixels) = self.memory_read, self.draw, IMAGE_MODES["jpg"], crops()
        rows = Compiler.get_iterator()  # range, or Numba's parallel prange

        def decode(batch, memory, metadata, file):
            destination, notes = memory
            for row in rows(len(batch)):
                record = metadata[batch[row]]
                height, width = np.int64(record["height"]), np.int64(record["width"])
                top, left, h, w, mirrored = draw(notes[row, 0], batch[row], height, width)
                data, damaged = read(record["data_ptr"], file), False
                if record["mode"] == jpeg:
                    damaged = crop_jpeg(data, height, width, top, left, h, w, mirrored, destination[row])
                else:
                    crop_pixels(data.reshape(height, width, 3), top, left, h, w, mirrored, destination[row])
                notes[row, 1] = batch[row] if damaged else -1
            return destination[: len(batch)]

        decode.is_parallel = True
        return decode


class DecodingThread(EpochIterator):
    """FFCV's thread over a list of images, and the iterator over its batches: uint8 arrays (batch, R, R, 3).

    A batch's memory is overwritten as soon as the next batch has been taken.
    """

    def __init__(
        self, loader: Loader, beton: BetonFile, images: np.ndarray, key: np.uint64, read_ahead: ReadAhead | None = None
    ) -> None:
        self.beton, self.key, self.read_ahead = beton, key, read_ahead
        self.failure = None
        self.taken = 0
        super().__init__(loader, images)

    def start(self) -> None:
        """Called by FFCV's constructor once it has allocated the memory of our one operation."""
        [(_, notes)] = self.memory_allocations["operation"].values()
        notes[..., 0] = self.key.astype(np.int64)
        self.damaged = notes[..., 1]
        super().start()

    def run(self) -> None:
        numba.set_parallel_chunksize(
            1
        )  # one image at a time: threads with equal shares of a batch would wait for the last
        try:
            super().run()
        except Exception as error:  # FFCV would let the thread die, and its reader wait for ever
            self.failure = error

    def __next__(self) -> np.ndarray:
        while True:
            running = self.is_alive()  # asked first: the thread may put its last batch and end while we wait
            try:
                batch = self.output_queue.get(timeout=1)
                break
            except Empty:
                if not running:
                    raise DataError(f"decoding {self.loader.fname} failed: {self.failure!r}") from self.failure
        if batch is None:
            raise StopIteration
        slot, (images,) = batch
        damaged = self.damaged[slot, : len(images)]
        if changed := [image for image in damaged[damaged >= 0].tolist() if not self.beton.is_as_converted(image)]:
            raise DataError(
                f"image {changed[0]} of {self.loader.fname} is damaged; copy the file again, or find all damaged "
                "images with tools/convert_imagenet_to_ffcv.py --verify"
            )
        self.taken += len(images)
        if self.read_ahead:
            self.read_ahead.advance(self.taken)
        return images

    def close(self) -> None:
        """Ends the thread, which may be waiting for a place in the queue."""
        self.iter_ixes = iter(())
        while self.is_alive():
            with contextlib.suppress(Empty):
                self.output_queue.get(timeout=0.1)
        super().close()
        self.closed = True
        if self.read_ahead:
            self.read_ahead.close()


# --- our part: lists of images in, batches on the device out -----------------------------------------------------------


class _Loader:
    """One FFCV pipeline, compiled once, that can be run over any list of images."""

    def __init__(
        self,
        beton: BetonFile | str | os.PathLike,
        draw: Callable,
        *,
        batch: int,
        resolution: int,
        threads: int,
        device: torch.device | str,
        dtype: torch.dtype,
        channels_last: bool,
        from_disk: bool = False,
    ) -> None:
        if not 1 <= threads <= numba.config.NUMBA_NUM_THREADS:
            raise ConfigError(
                f"{threads} loader threads are not possible: this process can use 1 to "
                f"{numba.config.NUMBA_NUM_THREADS}; give --loader_threads"
            )
        self.beton = beton if isinstance(beton, BetonFile) else BetonFile.open(beton)
        self.batch, self.device, self.from_disk = batch, device, from_disk
        self._prefetcher = Prefetcher(device, dtype, channels_last)
        self._ffcv = Loader(
            os.fspath(self.beton.path),
            batch,
            num_workers=threads,
            os_cache=True,
            order=OrderOption.SEQUENTIAL,
            seed=0,  # not used; without it, FFCV draws one from NumPy's global generator
            pipelines={self.beton.image_field: [CropDecoder(resolution, draw)], self.beton.label_field: None},
        )  # BetonFile has read the labels
        self._threads: set[DecodingThread] = set()

    def close(self) -> None:
        """Ends the threads of all iterators that have not reached their end."""
        for thread in list(self._threads):
            thread.close()

    def _batches(self, images: np.ndarray, key: np.uint64) -> Batches:
        if len(images) == 0:
            return
        labels = torch.from_numpy(self.beton.labels[images]).to(self.device).split(self.batch)
        read_ahead = None
        if self.from_disk:
            read_ahead = ReadAhead(self.beton.path, self.beton.images["data_at"][images], self.beton.sizes[images])
        thread = DecodingThread(self._ffcv, self.beton, images, key, read_ahead)
        self._threads.add(thread)
        try:
            yield from zip(self._prefetcher(thread), labels, strict=True)
        finally:
            thread.close()
            self._threads.discard(thread)


class TrainLoader(_Loader):
    """One rank's part of the training images, augmented (Sec. 5.1).

    Images come as (micro_batch, 3, resolution, resolution) in dtype, labels as int64, both on the device. Which images,
    and how they are cut, depends on seed and epoch alone: not on threads, world size, micro batch, or where one starts.
    """

    def __init__(
        self,
        beton: BetonFile | str | os.PathLike,
        *,
        seed: int,
        global_batch: int,
        world_size: int,
        rank: int,
        micro_batch: int,
        resolution: int,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        flip: bool = True,
        threads: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        from_disk: bool = False,
    ) -> None:
        super().__init__(
            beton,
            random_resized_crop(crop_scale, flip),
            batch=micro_batch,
            resolution=resolution,
            threads=threads,
            device=device,
            dtype=dtype,
            channels_last=channels_last,
            from_disk=from_disk,
        )
        self.seed, self.global_batch, self.world_size, self.rank = seed, global_batch, world_size, rank

    def epoch(self, epoch: int, first_iteration: int = 0) -> Batches:
        """This rank's passes, accumulation_steps of them an iteration, from first_iteration to the end of the epoch."""
        images = rank_batches(
            epoch_order(self.beton.num_images, self.seed, epoch),
            global_batch=self.global_batch,
            world_size=self.world_size,
            micro_batch=self.batch,
            rank=self.rank,
            first_iteration=first_iteration,
        )
        return self._batches(images.reshape(-1), crop_key(self.seed, epoch))

    def statistics_batches(self, epoch: int, num_images: int, per_worker_batch: int) -> Iterator[torch.Tensor]:
        """The first num_images of the epoch, without labels, to recompute batch norm's statistics from (Sec. 5.2).

        They come in whole groups of n = per_worker_batch, as many at once as a micro batch holds. The groups are the
        same for any world size; each rank gets its share of them.
        """
        assert self.batch % per_worker_batch == 0
        groups = rank_groups(
            epoch_order(self.beton.num_images, self.seed, epoch),
            num_images=num_images,
            per_worker_batch=per_worker_batch,
            world_size=self.world_size,
            rank=self.rank,
        )
        return (images for images, _ in self._batches(groups.reshape(-1), crop_key(self.seed, epoch)))


class EvalLoader(_Loader):
    """One rank's share of the validation images by their centre crop; all shares together hold each image exactly once.

    Every iteration over it yields (images, labels) in batches, the last one smaller; on a rank without images, nothing.
    """

    def __init__(
        self,
        beton: BetonFile | str | os.PathLike,
        *,
        world_size: int,
        rank: int,
        batch: int,
        resolution: int,
        threads: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
        from_disk: bool = False,
    ) -> None:
        super().__init__(
            beton,
            centre_crop,
            batch=batch,
            resolution=resolution,
            threads=threads,
            device=device,
            dtype=dtype,
            channels_last=channels_last,
            from_disk=from_disk,
        )
        self.share = rank_share(self.beton.num_images, world_size=world_size, rank=rank)

    def __iter__(self) -> Batches:
        return self._batches(self.share, np.uint64(0))


class SharedShuffleOrder(TraversalOrder):
    """Remark 4 for FFCV's own Loader: the shared shuffle as its `order`.

        order = SharedShuffleOrder(global_batch=256, micro_batch=32, seed=0)
        loader = ffcv.loader.Loader(path, batch_size=32, order=order, drop_last=True, pipelines=...)

    Arguments as of `sampler.SharedShuffleSampler`. FFCV counts the epochs; loader.next_epoch = 5 goes on with the sixth.
    """

    def __init__(self, **cut) -> None:
        self.cut = cut

    def __call__(self, loader: Loader) -> SharedShuffleOrder:
        """Called by FFCV's Loader, which has the number of images."""
        self.sampler = SharedShuffleSampler(loader.reader.num_samples, **self.cut)
        return self

    def sample_order(self, epoch: int) -> np.ndarray:
        self.sampler.set_epoch(epoch)
        return self.sampler.batches.reshape(-1)
