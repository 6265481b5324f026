"""The only door to FFCV: its threads decode our crops (Sec. 5.1), and its own Loader takes our shuffle (Remark 4).

FFCV decodes in its own threads, without Python. This module adds three things. An image's crop and flip depend on
(seed, epoch, image) alone, not on threads, batches, processes or restarts. An epoch may start anywhere. A failure in
FFCV's thread ends the training instead of blocking it forever.

All of this is done in subclasses. FFCV's own classes and functions do not change: a stock Loader, with or without
`SharedShuffleOrder` as its order, behaves as if this module were not there.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from queue import Empty, Full
from types import SimpleNamespace

import numba
import numpy as np
from numba.extending import is_jitted

from lbsgd.algorithm.sampler import SharedShuffleSampler
from lbsgd.data.beton import BetonFile
from lbsgd.data.kept_code import keep, kept_dictionaries
from lbsgd.data.kept_threads import keeping_threads
from lbsgd.data.native.kernels import DONE, Crops, crop_batch, ffcv_crops, our_crops
from lbsgd.data.native.library import library
from lbsgd.data.read_ahead import ReadAhead
from lbsgd.data.undecoded import require_usable
from lbsgd.errors import DataError

with keeping_threads(), kept_dictionaries():
    from ffcv.fields.rgb_image import RGBImageField, SimpleRGBImageDecoder
    from ffcv.libffcv import imdecode, resize_crop
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers import MemoryContext
    from ffcv.pipeline import PipelineSpec
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.graph import Graph
    from ffcv.traversal_order.base import TraversalOrder


def crops() -> Crops:
    kernels = library()
    return our_crops(kernels) if kernels else ffcv_crops(Compiler.compile(imdecode), Compiler.compile(resize_crop))


class CropDecoder(SimpleRGBImageDecoder):
    """Decodes the box of an image that `draw` (see crops.py) chooses and resizes it to resolution x resolution pixels.

    FFCV gives each row of a batch the memory that an operation asks for: here the row's pixels and its notes, int64
    (2,), which are the key of the epoch and the status of the image (see kernels.py).
    """

    def __init__(self, resolution: int, draw: Callable) -> None:
        super().__init__()
        self.resolution, self.draw = resolution, draw

    def declare_state_and_memory(self, previous_state):
        pixels = AllocationQuery((self.resolution, self.resolution, 3), np.dtype("u1"))
        state = replace(previous_state, jit_mode=True, shape=pixels.shape, dtype=pixels.dtype)
        return state, (pixels, AllocationQuery((2,), np.dtype("i8")))

    def generate_code(self) -> Callable:
        return crop_batch(crops(), self.draw, rows=Compiler.get_iterator())


class MappedFile(MemoryContext):
    """The mapped file instead of FFCV's memory manager, which lists every image in Python dictionaries.

    FFCV's manager takes 600 bytes of private memory per image. It also finds an image's size by searching for its place
    among all places, and changes Numba's type of byte arrays to a read-only one for the whole process.
    """

    def __init__(self, beton: BetonFile) -> None:
        self.file = beton.content, beton.sizes

    def schedule_epoch(self, batches: Sequence) -> MappedFile:
        """Called by FFCV's iterator."""
        return self

    @property
    def state(self) -> tuple[np.ndarray, np.ndarray]:
        """The state that FFCV passes on to each operation."""
        return self.file

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(self, *_) -> None:
        """Keep the file mapped for the next epoch."""


class CropPipeline(Loader):
    """FFCV's Loader with a CropDecoder as its only pipeline, compiled once, over a mapped file.

    FFCV's constructor is not called, because it copies both tables and lists all images in each process. The graph of
    operations, its compilation and memory, and the iterator are FFCV's.
    """

    batches_ahead = 3  # FFCV's default

    def __init__(self, beton: BetonFile, decoder: CropDecoder, *, batch: int, threads: int) -> None:
        self.beton, self.fname = beton, os.fspath(beton.path)
        self.batch_size, self.num_workers = batch, threads
        self.memory_manager = MappedFile(beton)
        self.reader = SimpleNamespace(metadata={"f0": beton.images})  # the iterator looks for the tables here
        field = beton.image_field
        with keeping_threads():
            Compiler.set_num_threads(threads)
            specs, handlers = {field: PipelineSpec(field, decoder=decoder)}, {field: RGBImageField()}
            self.graph = Graph(specs, handlers, {field: 0}, self.reader.metadata, memory_read=None)
            self.generate_code()

    def generate_code(self) -> None:
        super().generate_code()
        [(stage, _)], _ = self.code
        for function in filter(is_jitted, stage.__globals__.values()):
            keep(function)


class DecodingThread(EpochIterator):
    """FFCV's thread over a list of images, and the iterator over its batches: uint8 arrays (batch, R, R, 3).

    The memory of a batch is overwritten as soon as the next batch has been taken.
    """

    def __init__(
        self, pipeline: CropPipeline, images: np.ndarray, key: np.uint64, read_ahead: ReadAhead | None = None
    ) -> None:
        self.images, self.key, self.read_ahead = images, key, read_ahead
        self.failure: Exception | None = None
        self.taken = 0
        super().__init__(pipeline, images[:0])  # none, because FFCV would cut them all into a list of batches

    def start(self) -> None:
        """Called by FFCV's constructor once it has allocated the memory of our one operation."""
        [(_, notes)] = self.memory_allocations["operation"].values()
        notes[..., 0] = self.key.astype(np.int64)
        self.statuses = notes[..., 1]
        self.cuda_streams = [None] * len(self.statuses)  # the thread is on device 0, where a stream opens a context
        super().start()

    def run(self) -> None:
        """Decode batch after batch. FFCV's own run sets torch's threads, and waits forever after a failure."""
        try:
            numba.set_num_threads(self.loader.num_workers)
            numba.set_parallel_chunksize(1)  # with equal shares of a batch, threads would wait for the slowest one
            for number, first in enumerate(range(0, len(self.images), self.loader.batch_size)):
                images = self.images[first : first + self.loader.batch_size].astype(np.int64)
                slot = number % len(self.statuses)
                if not self._put((slot, self.run_pipeline(number, images, slot, None))):
                    return
            self._put(None)
        except Exception as error:  # noqa: BLE001  __next__ reports any error in the reader's thread
            self.failure = error

    def _put(self, batch: tuple | None) -> bool:
        """Wait for a place in the queue. Return False if `close` is called first."""
        while not self.terminate_event.is_set():
            with contextlib.suppress(Full):
                self.output_queue.put(batch, timeout=0.5)
                return True
        return False

    def __next__(self) -> np.ndarray:
        batch = self._take()
        if batch is None:
            raise StopIteration
        slot, (pixels,) = batch
        numbers = self.images[self.taken : self.taken + len(pixels)]
        self._check(numbers, self.statuses[slot, : len(pixels)])
        self.taken += len(pixels)
        if self.read_ahead:
            self.read_ahead.advance(self.taken)
        return pixels

    def _take(self) -> tuple | None:
        """Wait for a batch. Raise what ended the thread if it has ended without one: DataError if the disk did."""
        while True:
            running = self.is_alive()  # asked first, because the thread may put its last batch and end while we wait
            with contextlib.suppress(Empty):
                return self.output_queue.get(timeout=1)
            if not running:
                if self.failure and not isinstance(self.failure, (OSError, MemoryError)):
                    raise self.failure  # a bug, with its traceback
                raise DataError(f"decoding {self.loader.fname} failed: {self.failure!r}") from self.failure

    def _check(self, numbers: np.ndarray, statuses: np.ndarray) -> None:
        """Raise DataError for an image that was not fully decoded, unless the converter found the same damage."""
        for number, status in zip(numbers[statuses != DONE], statuses[statuses != DONE], strict=True):
            require_usable(self.loader.beton, int(number), int(status))

    def close(self) -> None:
        """End the thread, which may be waiting for a place in the queue. FFCV calls it once more on deletion."""
        self.terminate_event.set()
        while self.is_alive():
            with contextlib.suppress(Empty):
                self.output_queue.get(timeout=0.1)
        super().close()
        if self.read_ahead:
            self.read_ahead.close()


class SharedShuffleOrder(TraversalOrder):
    """Remark 4 for FFCV's own Loader, as its `order`: the shared shuffle.

        order = SharedShuffleOrder(global_batch=256, micro_batch=32, seed=0)
        loader = ffcv.loader.Loader(path, batch_size=32, order=order, drop_last=True, pipelines=...)

    The arguments are those of `SharedShuffleSampler`. FFCV counts epochs; loader.next_epoch = 5 goes on with the sixth.
    """

    def __init__(
        self,
        *,
        global_batch: int,
        micro_batch: int,
        seed: int = 0,
        world_size: int | None = None,
        rank: int | None = None,
    ) -> None:
        self.micro_batch = micro_batch
        self.sampler_of = partial(
            SharedShuffleSampler,
            global_batch=global_batch,
            micro_batch=micro_batch,
            seed=seed,
            world_size=world_size,
            rank=rank,
        )

    def __call__(self, loader: Loader) -> SharedShuffleOrder:
        """Return the order of a Loader's images, for FFCV. Raises ValueError if its batches are not micro batches."""
        if (given := loader.batch_size) != self.micro_batch:
            raise ValueError(f"the Loader has batch_size={given}, and the order micro_batch={self.micro_batch}")
        order = copy.copy(self)  # because several Loaders may be given the same order
        order.indices = loader.indices
        order.sampler = self.sampler_of(len(loader.indices))
        return order

    def sample_order(self, epoch: int) -> np.ndarray:
        self.sampler.set_epoch(epoch)
        return self.indices[self.sampler.batches.reshape(-1)]
