"""Reads a data folder back, image by image, and names the first that is not what it was when it was made.

open_data has compared sizes, labels and checksums with the manifest, whose fingerprints cover them. What is left is that
each image's bytes have the checksum that was kept of them, and decode to the size that is kept of them. With the source
at hand, each image is made from it once more, and its label looked up there.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from lbsgd.convert import image as jpeg
from lbsgd.convert.convert import CHUNK_IMAGES, quiet_opencv
from lbsgd.convert.image import Settings, stored_image
from lbsgd.convert.process_pool import Workers, checked_workers, with_room
from lbsgd.convert.progress import Meter
from lbsgd.convert.sources import SPLITS, Files, Images, find_source
from lbsgd.data.beton import CONVERT, JPEG, BetonFile
from lbsgd.data.folder import ImageNetData, Manifest, Split, open_data
from lbsgd.errors import DataError


def verify(data_dir: Path, num_workers: int | None = None, source: Path | None = None) -> None:
    """Verifies all images of a data folder. Raises DataError for the first damaged one.

    source: the images must also be what this source gives with the manifest's settings.
    """
    jpeg.libraries()  # tells that there are none before any process does
    data_dir = Path(data_dir)
    num_workers = checked_workers(num_workers)
    data = _opened(data_dir, num_workers)
    manifest = Manifest.read(data_dir / "manifest.json") if (data_dir / "manifest.json").exists() else None
    if source and not manifest:
        raise DataError(f"{data_dir} has no manifest.json to say how it was made; verify it without --source")
    with tempfile.TemporaryDirectory() as scratch:
        found = find_source(Path(source), Path(scratch), data_dir) if source else None
        for name in SPLITS:
            images = getattr(found, name) if found else None
            _verify_split(name, getattr(data, name), images, manifest, num_workers)


def _opened(data_dir: Path, num_workers: int) -> ImageNetData:
    """open_data; where a file is not the manifest's, what is wrong may be an image that can be named."""
    try:
        return open_data(data_dir)
    except DataError:
        for beton, manifest in _other_files(data_dir):
            if manifest.first_wrong_label(beton) is None:  # which open_data has told
                _compare_images(beton, _entries(beton.path.stem, beton, None, manifest), None, manifest, num_workers)
        raise


def _other_files(data_dir: Path) -> list[tuple[BetonFile, Manifest]]:
    """Files that can be read and differ from the manifest."""
    with contextlib.suppress(DataError):
        manifest = Manifest.read(data_dir / "manifest.json")
        files = [BetonFile.open(data_dir / f"{name}.beton") for name in SPLITS]
        return [(beton, manifest) for beton in files if Split.of(beton) != getattr(manifest, beton.path.stem)]
    return []


def _verify_split(
    name: str, beton: BetonFile, images: Images | None, manifest: Manifest | None, num_workers: int
) -> None:
    entries = _entries(name, beton, images, manifest)
    meter = _compare_images(beton, entries, images, manifest, num_workers)
    against = [f"the source {images.origin}"] if images else []
    against += ["the manifest"] if manifest else []
    against += ["their checksums"] if beton.checksums is not None else []
    print(
        f"{name}: {beton.num_images:,} images decode and agree with {', '.join(against) or 'their sizes'}; "
        f"{meter.seconds():.1f} s ({meter.speed()})",
        flush=True,
    )


def _compare_images(
    beton: BetonFile, entries: np.ndarray, images: Images | None, manifest: Manifest | None, num_workers: int
) -> Meter:
    """Raises DataError for the first image that is not what it should be."""
    settings = Settings(**manifest.settings) if images else None
    sizes = beton.sizes.astype(np.int64)
    num_workers = min(with_room(num_workers, int(sizes.max())), -(-beton.num_images // CHUNK_IMAGES))
    big = multiprocessing.get_context("fork").RLock()
    with (
        Workers(num_workers, partial(_Job, beton, images, settings, big)) as workers,
        Meter(beton.path.stem, beton.num_images, int(sizes.sum())) as meter,
    ):
        for (wrong, images_read), _ in workers.results(_chunks(entries)):
            if wrong:
                index, reason = wrong
                raise DataError(
                    f"{beton.path}: image {index} (label {beton.labels[index]}) {reason}; copy the file "
                    f"again, or make it again with: {CONVERT.format(beton.path.parent)} --overwrite"
                )
            meter.advance(images_read, int(sizes[meter.done : meter.done + images_read].sum()))
    return meter


def _entries(name: str, beton: BetonFile, images: Images | None, manifest: Manifest | None) -> np.ndarray:
    """(image, its number in the source) of each image."""
    if images is None:
        return np.stack([np.arange(beton.num_images)] * 2, axis=1)
    skipped = {path.removeprefix(f"{images.origin}/") for path in manifest.skipped.get(name, ())}
    kept = np.array([number for number, path in enumerate(images.names) if path not in skipped], np.int64)
    if len(kept) != beton.num_images or images.classes != manifest.classes:
        raise DataError(
            f"{images.origin} holds {len(kept):,} images of {len(images.classes):,} classes, {beton.path} "
            f"{beton.num_images:,} of {len(manifest.classes):,}: it was made from another source; name "
            f"that one with --source"
        )
    wrong = np.flatnonzero(images.labels[kept] != beton.labels)
    if len(wrong):
        raise DataError(
            f"{beton.path}: image {wrong[0]} has label {beton.labels[wrong[0]]}, and "
            f"{images.where(kept[wrong[0]])} has {images.labels[kept[wrong[0]]]}"
        )
    return np.stack([np.arange(len(kept)), kept], axis=1)


def _chunks(entries: np.ndarray) -> Iterator[np.ndarray]:
    return (entries[at : at + CHUNK_IMAGES] for at in range(0, len(entries), CHUNK_IMAGES))


class _Job:
    """What a process does with a chunk of entries; gives (image, what is wrong with it) or None, and how many it read."""

    def __init__(self, beton: BetonFile, images: Images | None, settings: Settings | None, big) -> None:
        quiet_opencv()
        self.beton, self.images, self.settings, self.big = beton, images, settings, big
        self.file_bytes = beton.path.stat().st_size
        self.file, self.source = os.open(beton.path, os.O_RDONLY), Files(images.container) if images else None

    def __call__(self, chunk: np.ndarray, _slot: memoryview) -> tuple[tuple[int, str] | None, int]:
        for index, number in chunk:
            reason = self.wrong(int(index), int(number))
            if reason:
                return (int(index), reason), len(chunk)
        return None, len(chunk)

    def wrong(self, index: int, number: int) -> str | None:
        mode, width, height, data_at = self.beton.images[index].tolist()
        num_bytes = int(self.beton.sizes[index])
        if data_at + num_bytes > self.file_bytes:
            return "is damaged: the file says that it lies beyond its end"
        data = os.pread(self.file, num_bytes, data_at)
        checksum = zlib.crc32(data)
        if self.beton.checksums is not None and checksum != self.beton.checksums[index]:
            return f"is damaged: its bytes have checksum {checksum:08x}, not {self.beton.checksums[index]:08x}"
        if _decoded_size(data, self.big) != (width, height) if mode == JPEG else len(data) != 3 * width * height:
            return f"does not decode to its {width} x {height} pixels"
        if self.images is None:
            return None
        if self._checksum_from_source(number, len(data)) != checksum:
            return f"is not what {self.images.where(number)} gives with the manifest's settings and {jpeg.libraries()}"
        return None

    def _checksum_from_source(self, number: int, most_bytes: int) -> int | None:
        place = (int(column[number]) for column in (self.images.offsets, self.images.sizes))
        data = self.source.read(self.images.names[number], *place)
        try:
            return zlib.crc32(stored_image(data, number, self.settings, most_bytes, self.big).data)
        except Exception:  # PIL's decoders raise nearly anything
            return None


def _decoded_size(data: bytes, big) -> tuple[int, int] | None:
    try:
        return jpeg.decode(data, big).shape[1::-1]
    except Exception:  # PIL's decoders raise nearly anything
        return None
