"""What a conversion will take, before it begins: estimated from some images, evenly spread over the source."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lbsgd.convert.beton_writer import METADATA
from lbsgd.convert.image import COPIED, PIXELS, stored_image
from lbsgd.convert.settings import Settings
from lbsgd.convert.source_images import Files, Images, Source
from lbsgd.errors import DataError
from lbsgd.units import duration, size

TABLES_BYTES = METADATA.itemsize + 24 + 4  # of an image: metadata, allocation, checksum
MARGIN = 1.05  # of an estimate, when the disk is checked
SAMPLE_SECONDS = 3
WRITING_SECONDS = 1e-4  # of an image, on its way from a process to the file


@dataclass(frozen=True)
class Estimate:
    num_bytes: int  # of the result
    seconds: float  # of one process
    copied: float  # fraction of the images
    raw: float
    undecodable: float


def estimate(source: Source, settings: Settings, page: int, num_images: int) -> Estimate:
    """Converts num_images images of each split, or as many as SAMPLE_SECONDS allow, to nowhere."""
    parts = [_sample(images, settings, page, num_images) for images in (source.train, source.val)]
    weights = np.array([len(source.train), len(source.val)]) / (len(source.train) + len(source.val))
    return Estimate(
        num_bytes=sum(part.num_bytes for part in parts),
        seconds=sum(part.seconds for part in parts),
        **{
            name: float(np.dot(weights, [getattr(part, name) for part in parts]))
            for name in ("copied", "raw", "undecodable")
        },
    )


def _sample(images: Images, settings: Settings, page: int, num_images: int) -> Estimate:
    import cv2  # not part of the time that the images take

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    indices = np.random.default_rng(0).permutation(
        np.linspace(0, len(images) - 1, min(num_images, len(images)), dtype=int)
    )
    files, kinds, kept, start = Files(images.container), [], ([], []), time.monotonic()
    for index in indices:
        data = files.read(images.names[index], int(images.offsets[index]), int(images.sizes[index]))
        try:
            stored = stored_image(data, int(index), settings, page)
            kinds.append(stored.kind)
            kept[stored.kind == PIXELS].append((len(data), len(stored.data)))
        except Exception:  # PIL's decoders raise nearly anything
            kinds.append(None)
        if time.monotonic() - start > SAMPLE_SECONDS:
            break
    cv2.setNumThreads(threads)
    shares = (1 - settings.raw_fraction, settings.raw_fraction)
    mean = sum(share * _mean_size(found or kept[0] or kept[1], images.sizes) for share, found in zip(shares, kept))
    return Estimate(
        num_bytes=int(len(images) * mean) + TABLES_BYTES * len(images),
        seconds=((time.monotonic() - start) / len(kinds) + WRITING_SECONDS) * len(images),
        copied=kinds.count(COPIED) / len(kinds),
        raw=kinds.count(PIXELS) / len(kinds),
        undecodable=kinds.count(None) / len(kinds),
    )


def _mean_size(found: list[tuple[int, int]], sizes: np.ndarray) -> float:
    """Mean size of all results, from (size of the source, size of the result) of some, and the sizes of all sources.

    By linear regression: of images that are kept as they are, all that is known of the sources counts; of images that are
    shrunk to one size, nothing does.
    """
    if not found:
        return 0.0
    x, y = np.array(found, float).T
    slope = np.cov(x, y, bias=True)[0, 1] / max(1.0, x.var())
    return max(0.0, y.mean() + slope * (sizes.mean() - x.mean()))


def free_bytes(folder: Path) -> int:
    """Of the disk that the folder is on, or will be."""
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free


def check_disk(source: Source, settings: Settings, page: int, work: Path, done: int) -> None:
    """Raises DataError where the result will not fit on the disk; `done` bytes of it are there already."""
    needed = int(MARGIN * estimate(source, settings, page, num_images=24).num_bytes) - done
    free = free_bytes(work)
    if free < needed:
        raise DataError(
            f"{work.parent} has {size(free)} free, and the result needs about {size(needed)} more;"
            f" make room or name another folder with --data_dir (--short_side 256 makes small files)"
        )


def dry_run(source: Source, settings: Settings, page: int, data_dir: Path, num_workers: int) -> str:
    """What was found, the size of the result and the time it will take."""
    found = estimate(source, settings, page, num_images=200)
    again = max(0.0, 1 - found.copied - found.raw - found.undecodable)
    lines = [
        f"found   {images.origin}: {len(images):,} {name} images, {size(images.sizes.sum())}"
        for name, images in (("training", source.train), ("validation", source.val))
    ]
    lines += [
        f"classes {len(source.train.classes):,}, from {source.train.classes[0]} to {source.train.classes[-1]}",
        f"result  about {size(found.num_bytes)} in {data_dir} ({size(free_bytes(data_dir))} free): "
        f"{found.copied:.0%} of the images untouched, {again:.0%} encoded again"
        + (f", {found.raw:.0%} kept as pixels" if found.raw else "")
        + (f", {found.undecodable:.1%} cannot be decoded" if found.undecodable else ""),
        f"time    about {duration(found.seconds / num_workers)} with {num_workers} processes, if the disk keeps up",
    ]
    return "\n".join(lines)
