"""Estimate what a conversion will take before it begins, from a sample of images evenly spread over the source."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from lbsgd.convert import beton_writer
from lbsgd.convert.image import (
    COPIED,
    ENCODED,
    PIXELS,
    UNDECODABLE,
    Stored,
    out_of_memory_is_told,
    quiet_opencv,
    stored_image,
    without_opencv_threads,
)
from lbsgd.convert.process_pool import ProcessPool
from lbsgd.convert.settings import Settings
from lbsgd.convert.source_images import ImageReader, Images, Source
from lbsgd.data.beton_format import ALLOCATION, CHECKSUM
from lbsgd.data.pil_image import ImageError
from lbsgd.disk import exists, nearest
from lbsgd.errors import DataError
from lbsgd.units import size

TABLES_BYTES = beton_writer.METADATA.itemsize + ALLOCATION.itemsize + CHECKSUM.itemsize  # per image
MARGIN = 1.05  # the estimated size is multiplied by it when the disk is checked
SAMPLE_SECONDS = 3
PACKED_IMAGES = 10_000  # put into pages to see how much of the pages' ends stays unused
WRITING_SECONDS = 1e-4  # per image, on its way from a process to the file


@dataclass(frozen=True)
class Estimate:
    num_bytes: int  # of the result
    seconds: float  # of one process
    copied: float  # fraction of the images
    encoded: float
    raw: float
    scaled: float  # from 16 bits to 8
    looked_at: int  # number of images in the sample
    damaged: int  # number of these that cannot be decoded
    broken: str  # one of these that cannot be decoded; empty if there is none


def page_size_for(source: Source, settings: Settings) -> int:
    """Return the size of the result's pages."""
    largest = max(int(images.sizes.max()) for images in source.splits.values())
    return beton_writer.page_size(settings.side, largest, raw=settings.raw_fraction > 0)


def estimate(source: Source, settings: Settings, num_images: int) -> Estimate:
    """Convert num_images images of each split, or as many as SAMPLE_SECONDS allows, and keep none.

    This happens in a separate process, in which OpenCV prints nothing. Raises DataError if the process dies.
    """
    sample = partial(_sample, source, settings, page_size_for(source, settings), num_images)
    origins, then = {name: images.origin for name, images in source.splits.items()}, "see that more memory is free"
    with without_opencv_threads(), ProcessPool(1, lambda: sample, origins.__getitem__, then) as pool:
        parts = [part for part, _ in pool.results(source.splits)]
    weights = np.array([len(images) for images in source.splits.values()]) / len(source)
    return Estimate(
        num_bytes=sum(part.num_bytes for part in parts),
        seconds=sum(part.seconds for part in parts),
        copied=float(weights @ [part.copied for part in parts]),
        encoded=float(weights @ [part.encoded for part in parts]),
        raw=float(weights @ [part.raw for part in parts]),
        scaled=float(weights @ [part.scaled for part in parts]),
        looked_at=sum(part.looked_at for part in parts),
        damaged=sum(part.damaged for part in parts),
        broken=next((part.broken for part in parts if part.broken), ""),
    )


def _sample(
    source: Source, settings: Settings, page_size: int, num_images: int, split: str, _slot: memoryview
) -> Estimate:
    quiet_opencv()
    images = source.splits[split]
    spread = np.linspace(0, len(images) - 1, min(num_images, len(images)), dtype=int)
    reader, start = images.reader(), time.monotonic()
    kinds: list[int] = []
    num_scaled, broken = 0, ""
    jpegs: list[tuple[int, int]] = []  # sizes: (in the source, kept)
    pixels: list[tuple[int, int]] = []  # the same of all images, as they would be kept by raw_fraction=1
    kept: list[int] = []
    for number, index in enumerate(np.random.default_rng(0).permutation(spread).tolist()):
        stored = _stored(images, index, number, reader, settings, page_size)
        kinds.append(stored.kind if stored else UNDECODABLE)
        if stored:
            num_scaled += stored.scaled
            kept.append(len(stored.data))
            num_bytes, of_source = 3 * stored.width * stored.height, int(images.sizes[index])
            pixels.append((of_source, num_bytes if num_bytes <= page_size else kept[-1]))
            if stored.kind != PIXELS:
                jpegs.append((of_source, kept[-1]))
        else:
            broken = images.where(index)
        if time.monotonic() - start > SAMPLE_SECONDS:
            break
    mean = (1 - settings.raw_fraction) * _mean_size(jpegs, images.sizes)
    mean += settings.raw_fraction * _mean_size(pixels, images.sizes)
    in_pages = _in_pages(kept, len(images), page_size)
    return Estimate(
        num_bytes=int(len(images) * mean * in_pages) + TABLES_BYTES * len(images),
        seconds=((time.monotonic() - start) / len(kinds) + WRITING_SECONDS) * len(images),
        copied=kinds.count(COPIED) / len(kinds),
        encoded=kinds.count(ENCODED) / len(kinds),
        raw=kinds.count(PIXELS) / len(kinds),
        scaled=num_scaled / len(kinds),
        looked_at=len(kinds),
        damaged=kinds.count(UNDECODABLE),
        broken=broken,
    )


def _stored(
    images: Images, index: int, number: int, reader: ImageReader, settings: Settings, page_size: int
) -> Stored | None:
    """Return what is kept of an image, or None if it cannot be decoded.

    number: its place in the sample, which says whether pixels are kept. The images whose pixels are kept are evenly
    spread, as the sample is, so by their index the sample might hold none of them.
    """
    data = reader.read(images.member(index))
    try:
        with out_of_memory_is_told(partial(images.where, index)):
            return stored_image(data, number, settings, page_size)
    except ImageError:
        return None


def _in_pages(sizes: Sequence[int], num_images: int, page_size: int) -> float:
    """Return how much larger a file is than its images, because no image crosses a page (see `BetonWriter.append`)."""
    end = used = 0
    for num_bytes in itertools.islice(itertools.cycle(sizes), min(num_images, PACKED_IMAGES)):
        if end % page_size + num_bytes > page_size:
            end += -end % page_size
        end, used = end + num_bytes, used + num_bytes
    return end / used if used else 1.0


def _mean_size(found: Sequence[tuple[int, int]], sizes: np.ndarray) -> float:
    """Return the mean size of all results, by linear regression on the sizes in the source.

    The sizes in the source tell everything if images are kept untouched, and nothing if images are shrunk to one size.
    found: (size in the source, size of the result) of some images. sizes: those of all images in the source.
    """
    if not found:
        return 0.0
    x, y = np.array(found, float).T
    slope = np.cov(x, y, bias=True)[0, 1] / max(1.0, x.var())
    return max(0.0, y.mean() + slope * (sizes.mean() - x.mean()))


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that the folder is, or will be, on."""
    return shutil.disk_usage(nearest(folder, exists)).free


def check_disk(source: Source, settings: Settings, work: Path, done: int) -> None:
    """Raise DataError if the result will not fit on the disk, which already holds `done` bytes of it."""
    needed = int(MARGIN * max(0, estimate(source, settings, num_images=24).num_bytes - done))
    if full := no_room(work.parent, free_bytes(work.parent), needed, "the result needs"):
        raise DataError(full)


def no_room(data_dir: Path, free: int, needed: int, needs: str) -> str | None:
    """Return what to say if the disk has less than `needed` bytes free, else None."""
    if free >= needed:
        return None
    return (
        f"{data_dir} has {size(free)} free, and {needs} about {size(needed)} more;"
        f" make room or name another folder with --data_dir (--short_side 256 makes small files)"
    )
