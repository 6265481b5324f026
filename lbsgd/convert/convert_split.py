"""Convert the images of one split: processes read and encode them in chunks, and one writer puts them into the file."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from lbsgd.convert.beton_writer import RECORD, BetonWriter
from lbsgd.convert.files import Member
from lbsgd.convert.image import (
    SCALED,
    UNDECODABLE,
    Lock,
    Stored,
    lock_if_big,
    out_of_memory_is_told,
    quiet_opencv,
    stored_image,
)
from lbsgd.convert.process_pool import CHUNK_IMAGES, ProcessPool, with_room
from lbsgd.convert.progress import Meter
from lbsgd.convert.settings import Settings
from lbsgd.convert.source_images import Images
from lbsgd.data.pil_image import ImageError
from lbsgd.data.process_lock import process_lock
from lbsgd.output import say
from lbsgd.units import size

COMMIT_SECONDS = 2.0  # the most work that is lost if the process or the machine dies
CHUNK_BYTES = 6 << 20  # of the source, for one process at a time
CHUNK_RAW_BYTES = 24 << 20  # the most that a chunk may become if images are kept as pixels

Chunk = list[tuple[int, Member]]  # (number, place) of some images


class ConvertedChunk(NamedTuple):
    records: np.ndarray  # of RECORD, one per image
    num_in_slot: int  # number of images, from the first on, whose bytes are in the slot
    rest: bytes  # the bytes of the other images


def convert_split(name: str, images: Images, writer: BetonWriter, settings: Settings, num_processes: int) -> None:
    """Convert the images that the writer does not have yet.

    Raises DataError if a process dies or fails.
    """
    done = writer.done
    if done == len(images):
        return
    kept_bytes = _kept_bytes(images, settings, writer.page_size)
    num_processes = min(_fitting(name, num_processes, kept_bytes), -(-(len(images) - done) // CHUNK_IMAGES))
    make_job = partial(ChunkConverter, images, settings, writer.page_size, process_lock())
    num_bytes, done_bytes = int(images.sizes.sum()), int(images.sizes[:done].sum())

    def place(chunk: Chunk) -> str:
        return " to ".join(dict.fromkeys(images.where(number) for number, _ in (chunk[0], chunk[-1])))

    with (
        ProcessPool(num_processes, make_job, place) as pool,
        Commits(writer, COMMIT_SECONDS) as commits,
        Meter(name, len(images), num_bytes, done=done, done_bytes=done_bytes, failed=writer.failed()) as meter,
    ):
        chunks = _chunks(images, done, _images_per_chunk(settings, kept_bytes))
        for (records, num_in_slot, rest), slot in pool.results(chunks):
            writer.append(records[:num_in_slot], slot)
            writer.append(records[num_in_slot:], memoryview(rest))
            of_chunk = slice(writer.done - len(records), writer.done)
            meter.advance(len(records), int(images.sizes[of_chunk].sum()), writer.failed(of_chunk))
            commits.start_if_due()
    speed = f"{len(images) - done:,} images in {meter.seconds():.1f} s ({meter.speed()})"
    say(f"{name}: {speed}{meter.failures()}, {size(writer.end)}")


def _kept_bytes(images: Images, settings: Settings, page_size: int) -> int:
    """Return the largest size, in bytes, at which an image may be kept."""
    most = 3 * settings.side**2 if settings.raw_fraction else int(images.sizes.max())
    return max(1, min(most, page_size))


def _fitting(name: str, num_processes: int, kept_bytes: int) -> int:
    """Return how many processes fit into memory, and say so if they are fewer than asked for."""
    fewer = with_room(num_processes, kept_bytes)
    if fewer < num_processes:
        reason = f"because one image may need {size(kept_bytes)}"
        say(f"{name}: {fewer} of {num_processes} processes, {reason}")
    return fewer


def _images_per_chunk(settings: Settings, kept_bytes: int) -> int:
    return min(max(1, CHUNK_RAW_BYTES // kept_bytes), CHUNK_IMAGES) if settings.raw_fraction else CHUNK_IMAGES


def _chunks(images: Images, first: int, most_images: int) -> Iterator[Chunk]:
    """Yield chunks of the images from number `first` on.

    Each image comes with its name, because a look-up in the process would copy the memory that holds the name.
    """
    chunk: Chunk = []
    num_bytes = 0
    for index in range(first, len(images)):
        chunk.append((index, images.member(index)))
        num_bytes += chunk[-1][1].num_bytes
        if len(chunk) == most_images or num_bytes >= CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


class ChunkConverter:
    """A process's job: reads and converts the images of a chunk, and puts their bytes into the slot."""

    def __init__(self, images: Images, settings: Settings, page_size: int, memory_lock: Lock) -> None:
        quiet_opencv()
        self.images, self.reader, self.memory_lock = images, images.reader(), memory_lock
        self.store = partial(stored_image, settings=settings, page_size=page_size, memory_lock=memory_lock)

    def __call__(self, chunk: Chunk, slot: memoryview) -> ConvertedChunk:
        records, used, num_in_slot = np.zeros(len(chunk), RECORD), 0, len(chunk)
        rest: list[bytes] = []
        for row, (index, member) in enumerate(chunk):
            try:
                stored = self._stored(index, member)
            except ImageError:
                records[row]["kind"] = UNDECODABLE
                continue
            data = stored.view
            kind = stored.kind + SCALED * stored.scaled
            records[row] = (kind, stored.width, stored.height, len(data), zlib.crc32(data), 0)
            if rest or used + len(data) > len(slot):
                num_in_slot = num_in_slot if rest else row
                rest.append(bytes(data))
            else:
                slot[used : used + len(data)] = data
                used += len(data)
        return ConvertedChunk(records, num_in_slot, b"".join(rest))

    def _stored(self, index: int, member: Member) -> Stored:
        told = out_of_memory_is_told(partial(self.images.where, index))
        with told, lock_if_big(self.memory_lock, 3 * member.num_bytes):
            return self.store(self.reader.read(member), index)


class Commits:
    """Forces the work to the disk every few seconds, in a thread, so that the conversion goes on meanwhile.

    The next call raises an OSError of the thread. Leaving the context waits for the thread, because the next conversion
    in the folder may begin then. If there was no exception, leaving also commits the rest.
    """

    def __init__(self, writer: BetonWriter, seconds: float) -> None:
        self.writer, self.seconds = writer, seconds
        self.started_at = time.monotonic()
        self.thread: threading.Thread | None = None
        self.error: OSError | None = None

    def __enter__(self) -> Commits:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_) -> None:
        if self.thread:
            self.thread.join()
        if error_type is None:
            self._raise_error()
            self.writer.commit(self.writer.done)

    def start_if_due(self) -> None:
        """Start a commit if the last one is done and was started long enough ago."""
        self._raise_error()
        if time.monotonic() - self.started_at < self.seconds or (self.thread and self.thread.is_alive()):
            return
        self.started_at = time.monotonic()
        self.thread = threading.Thread(target=self._commit, args=(self.writer.done,), daemon=True)
        self.thread.start()

    def _commit(self, done: int) -> None:
        try:
            self.writer.commit(done)
        except OSError as error:
            self.error = error

    def _raise_error(self) -> None:
        if self.error:
            raise self.error
