"""ImageNet as folders of images -> train.beton, val.beton and manifest.json.

A data folder is complete or it is not there: the files are written under temporary names, verified, put on the disk and
renamed, and the manifest is written last.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from lbsgd.beton import CONVERT, BetonFile, Manifest, Split
from lbsgd.disk import to_disk
from lbsgd.errors import DataError, missing_ffcv

CONVERTER_VERSION = 1  # to be raised when the same source and settings would give other files
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Source:
    """The images of one split, in the order of torchvision's ImageFolder: class by class, sorted by name."""

    folder: Path
    classes: list[str]
    paths: list[Path]
    labels: list[int]


def convert(source: Path, data_dir: Path, *, max_side: int, quality: int, num_workers: int, overwrite: bool) -> None:
    """Makes the data folder from a folder that holds train/<class>/* and val/<class>/*.

    Images are decoded as PIL does, shrunk to max_side pixels on their longer side, and kept as JPEGs of this quality.
    Raises DataError, with nothing left under the final names, where the source or one of its images cannot be used.
    """
    train, val = read_source(source, data_dir)
    settings = {"max_side": max_side, "quality": quality}
    if not overwrite and _is_complete(data_dir, train, val, settings):
        print(f"{data_dir} is complete: {len(train.paths):,} training and {len(val.paths):,} validation images, "
              f"{len(train.classes):,} classes; --overwrite makes it again")
        return
    with _partial_files(data_dir) as partials:
        for split, path in zip((train, val), partials):
            _write_file(split, path, num_workers=num_workers, **settings)
        written = {name: Split.of(BetonFile.open(path)) for name, path in zip(SPLITS, partials)}
        _publish(data_dir, partials, Manifest(
            classes=train.classes, **written, source=str(source.resolve()), settings=settings,
            converter_version=CONVERTER_VERSION, ffcv_version=version("ffcv")))


# --- the source -------------------------------------------------------------------------------------------------------


def read_source(source: Path, data_dir: Path) -> tuple[Source, Source]:
    """The training and validation images of a source folder, which have the same classes."""
    missing = [name for name in SPLITS if not (source / name).is_dir()]
    if missing:
        raise DataError(f"no images in {source}: folder {' and '.join(missing)} not found; expected train/<class>/* "
                        f"and val/<class>/* there; name the source with: {CONVERT.format(data_dir)}")
    train, val = (_read_split(source / name) for name in SPLITS)
    if train.classes != val.classes:
        differing = sorted(set(train.classes) ^ set(val.classes))
        raise DataError(f"{val.folder} has other class folders than {train.folder}: {_some(differing)} in one of them "
                        f"only; both must have the same")
    return train, val


def _read_split(folder: Path) -> Source:
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    files = [_image_files(folder / name) for name in classes]
    empty = [name for name, paths in zip(classes, files) if not paths]
    if not classes or empty:
        raise DataError(f"no images in {folder}{' for class ' if empty else ''}{_some(empty)}; expected one folder a "
                        f"class, with images ({' '.join(SUFFIXES)}) in each")
    return Source(folder, classes, paths=[path for paths in files for path in paths],
                  labels=[label for label, paths in enumerate(files) for _ in paths])


def _image_files(folder: Path) -> list[Path]:
    """All images below a folder, in torchvision's order."""
    return [Path(place, name) for place, _, names in sorted(os.walk(folder, followlinks=True))
            for name in sorted(names) if name.lower().endswith(SUFFIXES)]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


# --- the data folder --------------------------------------------------------------------------------------------------


def _is_complete(data_dir: Path, train: Source, val: Source, settings: dict[str, int]) -> bool:
    """Whether the folder already holds what this conversion would make; DataError where it holds something else."""
    if not (data_dir / "manifest.json").exists():
        existing = [name for name in SPLITS if (data_dir / f"{name}.beton").exists()]
        if existing:
            raise DataError(f"{data_dir} holds {existing[0]}.beton, but no manifest.json of a complete conversion; "
                            f"give --overwrite to replace it, or another --data_dir")
        return False
    manifest = Manifest.read(data_dir / "manifest.json")
    same = {"settings": settings == manifest.settings,
            "converter version": CONVERTER_VERSION == manifest.converter_version,
            "source": str(train.folder.parent.resolve()) == manifest.source,
            "classes": train.classes == manifest.classes,
            "training images": len(train.paths) == manifest.train.num_images,
            "validation images": len(val.paths) == manifest.val.num_images}
    if not all(same.values()):
        differing = ", ".join(name for name in same if not same[name])
        raise DataError(f"{data_dir} already holds another data set: its manifest.json differs in {differing}; "
                        f"give --overwrite to replace it, or another --data_dir")
    return all(_is_intact(data_dir / f"{name}.beton", getattr(manifest, name)) for name in SPLITS)


def _is_intact(path: Path, split: Split) -> bool:
    try:
        return Split.of(BetonFile.open(path)) == split
    except DataError:
        return False


@contextlib.contextmanager
def _partial_files(data_dir: Path) -> Iterator[list[Path]]:
    """Temporary names in the data folder, of which nothing is left afterwards."""
    partials = [data_dir / f"{name}.beton.partial" for name in SPLITS]
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        for path in partials:
            path.write_bytes(b"")  # tells at once, not after hours, that the folder cannot be written to
        yield partials
    except OSError as error:
        raise DataError(f"cannot write to {data_dir}: {error.strerror}; name another folder with --data_dir") from error
    finally:
        for path in partials:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _publish(data_dir: Path, partials: list[Path], manifest: Manifest) -> None:
    """Gives complete files their final names; a reader that sees the manifest sees the files it was written for."""
    (data_dir / "manifest.json").unlink(missing_ok=True)
    for path in partials:
        to_disk(path)
        path.rename(path.with_suffix(""))
    to_disk(data_dir)
    manifest.write(data_dir / "manifest.json")


# --- one file, by FFCV's writer ---------------------------------------------------------------------------------------


def decode(path: Path) -> np.ndarray:
    """The image as PIL sees it, uint8 (height, width, 3): its content counts, not its suffix; CMYK, grey become RGB."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


class _Images:
    """What FFCV's writing processes index: (pixels, label).

    An exception in such a process would leave FFCV's main process waiting for ever. So an image that cannot be decoded
    is marked, in memory that the processes share, and a black pixel takes its place; the file is given up after the
    pass, when all such images are known.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.undecodable = multiprocessing.RawArray("b", len(source.paths))

    def __len__(self) -> int:
        return len(self.source.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        try:
            pixels = decode(self.source.paths[index])
        except Exception:  # PIL's decoders raise nearly anything
            self.undecodable[index] = 1
            pixels = np.zeros((1, 1, 3), np.uint8)
        return pixels, self.source.labels[index]


def _write_file(source: Source, path: Path, *, max_side: int, quality: int, num_workers: int) -> None:
    fields, writer = _import_ffcv()
    images, start = _Images(source), time.monotonic()
    dataset = writer.DatasetWriter(str(path), num_workers=num_workers, fields={
        "image": fields.RGBImageField(write_mode="jpg", max_resolution=max_side, jpeg_quality=quality),
        "label": fields.IntField()})
    with _watched(writer, dataset):
        dataset.from_indexed_dataset(images)
    seconds = time.monotonic() - start

    undecodable = [str(source.paths[index]) for index in np.flatnonzero(images.undecodable)]
    if undecodable:
        raise DataError(f"{source.folder}: {len(undecodable):,} of {len(images):,} images cannot be decoded; replace "
                        f"or remove: {' '.join(undecodable)}")
    print(f"{source.folder.name}: {len(images):,} images in {seconds:.1f} s ({len(images) / seconds:.0f} images/s), "
          f"{path.stat().st_size / 1e6:.1f} MB", flush=True)


def _import_ffcv():
    try:
        from ffcv import fields, writer
    except ImportError as error:
        raise missing_ffcv(error) from error
    return fields, writer


@contextlib.contextmanager
def _watched(writer, dataset) -> Iterator[None]:
    """FFCV's writer module, with its progress bar on terminals only, and ended by the death of one of its processes.

    It waits for all of them, and would do so for ever if the disk is full or one is killed because memory runs out.
    (Exceptions of the images are caught in `_Images`.) So a timer looks after them every second. What it raises is lost
    where it happens to interrupt a destructor, and comes again a second later.
    """
    originals = writer.Process, writer.tqdm
    processes = []

    def start_process(target, args):
        processes.append(multiprocessing.Process(target=_work, args=(target, *args)))
        return processes[-1]

    def look_after(*_) -> None:
        for code in filter(None, [process.exitcode for process in processes]):
            reason = os.strerror(code) if code > 0 else f"killed by signal {-code}, as when memory runs out"
            raise DataError(f"one of FFCV's processes that write {dataset.fname} died: {reason}")

    writer.Process, writer.tqdm = start_process, partial(writer.tqdm, disable=None, unit=" images")
    handler = signal.signal(signal.SIGALRM, look_after)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        yield
    except BaseException:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for process in processes:
            process.kill()
        with contextlib.suppress(AttributeError):  # where it has not been made yet
            dataset.metadata_sm.unlink()
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        writer.Process, writer.tqdm = originals


def _work(target, *args) -> None:
    """One of FFCV's writing processes; its exit code tells why it could not write."""
    try:
        target(*args)
    except OSError as error:
        sys.exit(error.errno)
