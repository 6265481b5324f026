"""Read a data folder back, image by image, and name the first image that differs from what was made.

open_data compares sizes, labels and checksums with the manifest, by their fingerprints. This module then checks that
each image's bytes have the checksum, and decode to the size, that the file keeps. If the source is given, each image is
also made from it again, and its label compared.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from lbsgd.convert.image import (
    Lock,
    decode,
    libraries,
    out_of_memory_is_told,
    quiet_opencv,
    stored_image,
    without_opencv_threads,
)
from lbsgd.convert.origin import Origin
from lbsgd.convert.process_pool import CHUNK_IMAGES, ProcessPool, checked_num_processes, with_room
from lbsgd.convert.progress import Meter
from lbsgd.convert.source_images import SPLITS, ImageReader, blocks
from lbsgd.convert.sources import find_source
from lbsgd.convert.work_folder import NOTHING_KEPT
from lbsgd.data.beton import BetonFile
from lbsgd.data.beton_format import JPEG, converting_into
from lbsgd.data.folder import ImageNetData, Manifest, Split, open_data
from lbsgd.data.pil_image import ImageError
from lbsgd.data.process_lock import process_lock
from lbsgd.disk import exists
from lbsgd.errors import DataError
from lbsgd.output import say
from lbsgd.processes.signals import stoppable


def verify(data_dir: Path, num_processes: int | None = None, source: Path | None = None) -> None:
    """Verify all images of a data folder. Raises DataError for the first damaged one.

    num_processes: by default one per core.
    source: if given, the images must also be those that it gives with the manifest's settings.
    Also raises Stopped after a stop signal.
    """
    libraries()  # raises ImportError here, before any process does
    data_dir, num_processes = Path(data_dir), checked_num_processes(num_processes)
    with stoppable(NOTHING_KEPT), without_opencv_threads():
        _verify(data_dir, num_processes, source)


def _verify(data_dir: Path, num_processes: int, source: Path | None) -> None:
    data = _opened(data_dir, num_processes)
    manifest = Manifest.read(data_dir / "manifest.json") if exists(data_dir / "manifest.json") else None
    if source and not manifest:
        raise DataError(f"{data_dir} has no manifest.json to say how it was made; verify it without --source")
    with tempfile.TemporaryDirectory() as scratch:
        found = find_source(Path(source), Path(scratch), data_dir) if source else None
        for name in SPLITS:
            beton = getattr(data, name)
            origin = Origin.of(beton, found, manifest) if found and manifest else None
            meter = _check_images(beton, origin, num_processes)
            _print_agreement(beton, origin, manifest, meter)


def _opened(data_dir: Path, num_processes: int) -> ImageNetData:
    """Return open_data's result. If a file does not match the manifest, try to name the wrong image."""
    try:
        return open_data(data_dir)
    except DataError:
        for beton, manifest in _other_files(data_dir):
            if manifest.first_wrong_label(beton) is None:  # else open_data's message names the image
                _check_images(beton, None, num_processes)
        raise


def _other_files(data_dir: Path) -> list[tuple[BetonFile, Manifest]]:
    """Return the readable files that differ from the manifest."""
    with contextlib.suppress(DataError):
        manifest = Manifest.read(data_dir / "manifest.json")
        files = [BetonFile.open(data_dir / f"{name}.beton") for name in SPLITS]
        return [(beton, manifest) for beton in files if Split.of(beton) != getattr(manifest, beton.path.stem)]
    return []


def _print_agreement(beton: BetonFile, origin: Origin | None, manifest: Manifest | None, meter: Meter) -> None:
    against = [f"the source {origin.images.origin}"] if origin else []
    against += ["the manifest"] * bool(manifest) + ["their checksums"] * (beton.checksums is not None)
    agree = f"{beton.num_images:,} images decode and agree with {', '.join(against) or 'their sizes'}"
    say(f"{beton.path.stem}: {agree}; {meter.seconds():.1f} s ({meter.speed()})")


def _check_images(beton: BetonFile, origin: Origin | None, num_processes: int) -> Meter:
    """Check all images of a file. Raises DataError for the first wrong one."""
    sizes = beton.sizes.astype(np.int64)
    num_processes = min(with_room(num_processes, int(sizes.max())), -(-beton.num_images // CHUNK_IMAGES))
    make_job = partial(ChunkVerifier, beton, origin, process_lock())

    def place(chunk: range) -> str:
        return f"images {chunk[0]:,} to {chunk[-1]:,} of {beton.path}"

    with (
        ProcessPool(num_processes, make_job, place, f"{NOTHING_KEPT}; --num_processes sets how many there are") as pool,
        Meter(beton.path.stem, beton.num_images, int(sizes.sum())) as meter,
    ):
        for (wrong, images_read), _ in pool.results(blocks(beton.num_images, CHUNK_IMAGES)):
            if wrong:
                index, reason = wrong
                raise DataError(
                    f"{beton.path}: image {index} (label {beton.labels[index]}) {reason}; copy the file "
                    f"again, or make it again with: {converting_into(beton.path.parent)} --overwrite"
                )
            meter.advance(images_read, int(sizes[meter.done : meter.done + images_read].sum()))
    return meter


class ChunkVerifier:
    """A process's job: checks the images of a chunk."""

    def __init__(self, beton: BetonFile, origin: Origin | None, memory_lock: Lock) -> None:
        quiet_opencv()
        self.beton, self.origin, self.memory_lock = beton, origin, memory_lock
        self.file_bytes = beton.path.stat().st_size
        self.file = os.open(beton.path, os.O_RDONLY)
        self.reader = origin.images.reader() if origin else None

    def __call__(self, chunk: range, _slot: memoryview) -> tuple[tuple[int, str] | None, int]:
        """Return (first wrong image, what is wrong with it), or None, and the number of images read."""
        for index in chunk:
            with out_of_memory_is_told(partial("{}: image {}".format, self.beton.path, index)):
                if reason := self.wrong(index):
                    return (index, reason), len(chunk)
        return None, len(chunk)

    def wrong(self, index: int) -> str | None:
        """Return what is wrong with an image, None if nothing is."""
        mode, width, height, data_at = self.beton.images[index].tolist()
        num_bytes = int(self.beton.sizes[index])
        if data_at + num_bytes > self.file_bytes:
            return "is damaged: the file says that it lies beyond its end"
        try:
            data = os.pread(self.file, num_bytes, data_at)
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        checksum = zlib.crc32(data)
        if self.beton.checksums is not None and checksum != self.beton.checksums[index]:
            return f"is damaged: its bytes have checksum {checksum:08x}, not {self.beton.checksums[index]:08x}"
        other_size = self._decoded_size(data) != (width, height) if mode == JPEG else len(data) != 3 * width * height
        if other_size:
            return f"does not decode to its {width} x {height} pixels"
        if self.origin and self.reader:
            return self._differs(self.origin, self.reader, index, checksum)
        return None

    def _decoded_size(self, data: bytes) -> tuple[int, ...] | None:
        try:
            return decode(data, self.memory_lock).shape[1::-1]
        except ImageError:
            return None

    def _differs(self, origin: Origin, reader: ImageReader, index: int, checksum: int) -> str | None:
        """Return how an image differs from what the source gives, None if it does not."""
        number = int(origin.numbers[index])
        data = reader.read(origin.images.member(number))
        with contextlib.suppress(ImageError):
            stored = stored_image(data, number, origin.settings, int(self.beton.sizes[index]), self.memory_lock)
            if zlib.crc32(stored.view) == checksum:
                return None
        gives = f"is not what {origin.images.where(number)} gives with the manifest's settings and {libraries()}"
        if origin.libraries in ({}, libraries()):  # {}: an earlier converter's manifest
            return gives
        return f"{gives} (it was made with {origin.libraries}, which may give other bytes)"
