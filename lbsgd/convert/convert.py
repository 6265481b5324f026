"""ImageNet as it is held -> train.beton, val.beton and manifest.json.

A data folder is complete or it is not there. All work is done in .converting within the data folder, which remembers how
far it is: the same command goes on from there, to the same bytes. Complete files are put on the disk and renamed, the
manifest last.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from lbsgd.convert import image as jpeg
from lbsgd.convert.beton_writer import RECORD, BetonWriter, page_size
from lbsgd.convert.estimate import check_disk, dry_run
from lbsgd.convert.image import KINDS, UNDECODABLE, Settings
from lbsgd.convert.process_pool import Workers, checked_workers, with_room
from lbsgd.convert.progress import Meter
from lbsgd.convert.sources import SPLITS, Files, Images, Source, find_source
from lbsgd.convert.work_folder import (
    CONVERTER_VERSION,
    identity,
    is_complete,
    is_published_by_half,
    listing,
    locked,
    publish,
    start_over_if_other,
    stoppable,
    writing_to,
)
from lbsgd.data.beton import BetonFile
from lbsgd.data.folder import Manifest, Split
from lbsgd.errors import ConfigError, DataError
from lbsgd.units import size

CHUNK_IMAGES, CHUNK_BYTES = 32, 6 << 20  # what a process is given at a time
CHUNK_RAW_BYTES = 24 << 20  # and at most so much may come of it, where images are kept as pixels


def convert(
    source: Path,
    data_dir: Path,
    *,
    max_side: int | None = None,
    short_side: int | None = None,
    quality: int = 90,
    raw_fraction: float = 0.0,
    reencode: bool = False,
    num_workers: int | None = None,
    on_error: str = "fail",
    overwrite: bool = False,
    commit_seconds: float = 2.0,
) -> None:
    """Makes the data folder from a source that `sources.find_source` understands, or goes on where it was interrupted.

    on_error: what to do, when all images have been tried, with those that cannot be decoded: "fail" or "skip".
    commit_seconds: at most so much work is lost when the process or the machine dies.
    Raises DataError, with nothing under the final names, where the source or one of its images cannot be used.
    """
    settings = Settings(max_side, short_side, quality, raw_fraction, reencode)
    num_workers = checked_workers(num_workers)
    if on_error not in ("fail", "skip"):
        raise ConfigError(f"--on_error {on_error} is not fail or skip")
    data_dir, work = Path(data_dir), Path(data_dir) / ".converting"
    with stoppable(data_dir):
        found = find_source(Path(source), work, data_dir)
        wanted = identity(found, settings)
        if not overwrite and not is_published_by_half(work, wanted) and is_complete(data_dir, found, settings):
            shutil.rmtree(work, ignore_errors=True)
            print(
                f"{data_dir} is complete: {len(found.train):,} training and {len(found.val):,} validation images, "
                f"{len(found.train.classes):,} classes; --overwrite makes it again"
            )
            return
        with writing_to(data_dir), locked(work):
            start_over_if_other(work, wanted)
            if not is_published_by_half(work, wanted):
                _write_splits(found, settings, work, num_workers, on_error, commit_seconds)
            publish(data_dir, work)


def look(source: Path, data_dir: Path, num_workers: int | None = None, **settings) -> str:
    """What `convert` would do, in some lines (--dry_run). Leaves nothing behind."""
    settings, num_workers = Settings(**settings), checked_workers(num_workers)
    with tempfile.TemporaryDirectory() as scratch:
        found = find_source(Path(source), Path(scratch), data_dir)
        return dry_run(found, settings, _page_size(found, settings), data_dir, num_workers)


def _write_splits(
    source: Source, settings: Settings, work: Path, num_workers: int, on_error: str, commit_seconds: float
) -> None:
    """Leaves train.beton, val.beton and manifest.json in the work folder."""
    splits = {name: getattr(source, name) for name in SPLITS}
    page = _page_size(source, settings)
    writers = {name: BetonWriter(work / f"{name}.beton", len(images), page) for name, images in splits.items()}
    done = sum(int(writer.records["num_bytes"].sum()) for writer in writers.values())
    check_disk(source, settings, page, work, done)
    for name, images in splits.items():
        _write_images(name, images, writers[name], settings, num_workers, commit_seconds)
    skipped = {name: _undecodable(images, writers[name]) for name, images in splits.items()}
    _tell_undecodable(source, skipped, on_error)
    for name, images in splits.items():
        writers[name].finish(images.labels)
    files = {name: BetonFile.open(work / f"{name}.beton") for name in SPLITS}
    Manifest(
        classes=source.train.classes,
        source=str(source.path.resolve()),
        settings=asdict(settings),
        converter_version=CONVERTER_VERSION,
        listing=listing(source),
        libraries=jpeg.libraries(),
        skipped=skipped,
        stored={
            name: {kind: int((writer.records["kind"] == code).sum()) for kind, code in KINDS.items()}
            for name, writer in writers.items()
        },
        images_per_class={
            name: np.bincount(beton.labels, minlength=len(source.train.classes)).tolist()
            for name, beton in files.items()
        },
        **{name: Split.of(beton) for name, beton in files.items()},
    ).write(work / "manifest.json")


def _page_size(source: Source, settings: Settings) -> int:
    return page_size(
        settings.side,
        max(int(images.sizes.max()) for images in (source.train, source.val)),
        raw=settings.raw_fraction > 0,
    )


def _write_images(
    name: str, images: Images, writer: BetonWriter, settings: Settings, num_workers: int, commit_seconds: float
) -> None:
    done = writer.done
    if done == len(images):
        return
    kept_bytes = 3 * settings.side**2 if settings.raw_fraction else int(images.sizes.max())
    kept_bytes = max(1, min(kept_bytes, writer.page_size))  # of an image, at most
    make_job = partial(_Job, images, settings, writer.page_size, multiprocessing.get_context("fork").RLock())
    fewer = with_room(num_workers, kept_bytes)
    if fewer < num_workers:
        print(
            f"{name}: {fewer} of {num_workers} processes, as an image may keep {size(kept_bytes)} of memory", flush=True
        )
    num_workers = min(fewer, -(-(len(images) - done) // CHUNK_IMAGES))
    at_a_time = max(1, CHUNK_RAW_BYTES // kept_bytes) if settings.raw_fraction else CHUNK_IMAGES
    with (
        Workers(num_workers, make_job) as workers,
        _committing(writer, commit_seconds) as commit_in_time,
        Meter(
            name, len(images), int(images.sizes.sum()), done=done, done_bytes=int(images.sizes[:done].sum())
        ) as meter,
    ):
        for (records, in_slot, rest), slot in workers.results(_chunks(images, done, min(at_a_time, CHUNK_IMAGES))):
            writer.append(records[:in_slot], slot)
            writer.append(records[in_slot:], memoryview(rest))
            meter.advance(len(records), int(images.sizes[writer.done - len(records) : writer.done].sum()))
            commit_in_time()
    print(
        f"{name}: {len(images) - done:,} images in {meter.seconds():.1f} s ({meter.speed()}), {writer.end / 1e6:.1f} MB",
        flush=True,
    )


def _chunks(images: Images, first: int, most_images: int) -> Iterator[list[tuple[int, str, int, int]]]:
    """(number, name, offset, bytes) of images, some at a time."""
    chunk, num_bytes = [], 0
    for index in range(first, len(images)):
        chunk.append((index, images.names[index], int(images.offsets[index]), int(images.sizes[index])))
        num_bytes += chunk[-1][3]
        if len(chunk) == most_images or num_bytes >= CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def quiet_opencv() -> None:
    """In a process of ours, OpenCV takes one core, and libjpeg's warnings are kept to itself, as with PIL."""
    import cv2

    cv2.setNumThreads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


class _Job:
    """What a process does with a chunk: reads, converts, and puts the bytes into the slot."""

    def __init__(self, images: Images, settings: Settings, page: int, big) -> None:
        quiet_opencv()
        self.files, self.big = Files(images.container), big
        self.store = partial(jpeg.stored_image, settings=settings, page_size=page, big=big)

    def __call__(self, chunk: list, slot: memoryview) -> tuple[np.ndarray, int, bytes]:
        """The records, how many of them have their bytes in the slot, and the bytes of the others."""
        records, used, in_slot, rest = np.zeros(len(chunk), RECORD), 0, len(chunk), []
        for row, (index, name, offset, num_bytes) in enumerate(chunk):
            try:
                with jpeg.room(self.big, 3 * num_bytes):
                    stored = self.store(self.files.read(name, offset, num_bytes), index)
            except DataError:
                raise
            except MemoryError as error:
                raise DataError(f"{name}: not enough memory to decode it; give fewer --num_workers") from error
            except Exception:  # PIL's decoders raise nearly anything
                records[row]["kind"] = UNDECODABLE
                continue
            size = len(stored.data)
            records[row] = (*stored[:3], size, zlib.crc32(stored.data), 0)
            if rest or used + size > len(slot):
                in_slot = in_slot if rest else row
                rest.append(bytes(stored.data))
            else:
                slot[used : used + size] = stored.data
                used += size
        return records, in_slot, b"".join(rest)


def _undecodable(images: Images, writer: BetonWriter) -> list[str]:
    return [images.where(index) for index in np.flatnonzero(writer.records["kind"] == UNDECODABLE)]


def _tell_undecodable(source: Source, skipped: dict[str, list[str]], on_error: str) -> None:
    names = [name for names in skipped.values() for name in names]
    if not names:
        return
    for name in names:
        print(f"cannot be decoded: {name}", flush=True)
    total = len(source.train) + len(source.val)
    if on_error == "fail":
        raise DataError(
            f"{source.path}: {len(names):,} of {total:,} images cannot be decoded ({', '.join(names[:3])}"
            f"{' ...' if len(names) > 3 else ''}); replace or remove them, or leave them out with --on_error "
            f"skip: the others are done"
        )
    print(f"left out: {len(names):,} of {total:,} images", flush=True)


@contextlib.contextmanager
def _committing(writer: BetonWriter, seconds: float) -> Iterator:
    """Gives what is to be called after each chunk: every so many seconds, a thread forces what is done to the disk."""
    state = {"thread": None, "at": time.monotonic(), "error": None}

    def commit(done: int) -> None:
        try:
            writer.commit(done)
        except OSError as error:
            state["error"] = error

    def commit_in_time() -> None:
        if state["error"]:
            raise state["error"]
        if time.monotonic() - state["at"] >= seconds and not (state["thread"] and state["thread"].is_alive()):
            state.update(at=time.monotonic(), thread=threading.Thread(target=commit, args=(writer.done,), daemon=True))
            state["thread"].start()

    yield commit_in_time
    if state["thread"]:
        state["thread"].join()
    commit_in_time()
    writer.commit(writer.done)
