"""A conversion's work folder, and the data folder in which its result appears complete or not at all.

data folder/.converting/    identity.json  the conversion that the work is for; work for any other is dropped
                            train.beton, val.beton with a .journal each (see beton_writer.py)
                            manifest.json  once all files are finished: from then on only their names are missing
                            *.tar, *.images    the content of a compressed source
                            *.listing          the members of a tar, or of shards
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lbsgd.convert.image import libraries
from lbsgd.convert.settings import Settings
from lbsgd.convert.source_images import SPLITS, Source
from lbsgd.data.beton import BetonFile
from lbsgd.data.folder import Manifest, Split
from lbsgd.disk import replace_file, to_disk
from lbsgd.errors import DataError, Stopped

CONVERTER_VERSION = 3  # raise it when the same source and settings would give other files


# --- what is there already --------------------------------------------------------------------------------------------


def conversion_identity(source: Source, settings: Settings) -> dict[str, object]:
    """Return all that the bytes of the result depend on; work that was done for another identity is of no use."""
    return {
        "settings": asdict(settings),
        "converter_version": CONVERTER_VERSION,
        "libraries": libraries(),
        "images": [images.digest(images.offsets, images.stamps) for images in source.splits.values()],
    }


def _read_identity(work: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((work / "identity.json").read_bytes())
    return None


def is_partly_published(work: Path, identity: Mapping[str, object]) -> bool:
    """Return whether an earlier run had finished all files and was interrupted while it gave them their names."""
    return (work / "manifest.json").exists() and _read_identity(work) == identity


def start_over_if_other(work: Path, identity: Mapping[str, object]) -> None:
    """Drop the work of another conversion; what was learned of its archives stays."""
    if _read_identity(work) == identity:
        return
    for path in work.iterdir():
        if path.name != "lock" and path.suffix not in (".tar", ".listing", ".images"):
            path.unlink()
    replace_file(work / "identity.json", json.dumps(identity).encode())


def is_complete(data_dir: Path, source: Source, settings: Settings) -> bool:
    """Return whether the folder already holds what this conversion would make. Raises DataError for other data."""
    if not (data_dir / "manifest.json").exists():
        existing = [name for name in SPLITS if (data_dir / f"{name}.beton").exists()]
        if existing:
            raise DataError(
                f"{data_dir} holds {existing[0]}.beton, but no manifest.json of a complete conversion; "
                f"give --overwrite to replace it, or another --data_dir"
            )
        return False
    manifest = Manifest.read(data_dir / "manifest.json")
    skipped = {name: len(manifest.skipped.get(name, ())) for name in SPLITS}
    same = {
        "settings": asdict(settings) == manifest.settings,
        "converter version": CONVERTER_VERSION == manifest.converter_version,
        "source": str(source.path.resolve()) == manifest.source,
        "classes": source.train.classes == manifest.classes,
        "training images": len(source.train) == manifest.train.num_images + skipped["train"],
        "validation images": len(source.val) == manifest.val.num_images + skipped["val"],
        "names or sizes of images": source.digest() == manifest.listing,
    }
    if not all(same.values()):
        differing = ", ".join(name for name in same if not same[name])
        raise DataError(
            f"{data_dir} already holds another data set: its manifest.json differs in {differing}; "
            f"give --overwrite to replace it, or another --data_dir"
        )
    return all(_is_intact(data_dir / f"{name}.beton", getattr(manifest, name)) for name in SPLITS)


def _is_intact(path: Path, split: Split) -> bool:
    with contextlib.suppress(DataError):
        return Split.of(BetonFile.open(path)) == split
    return False


# --- the data folder --------------------------------------------------------------------------------------------------


class _Stop(BaseException):
    """Not an Exception, so that nothing between the signal and `stoppable` catches it."""


@contextlib.contextmanager
def stoppable(data_dir: Path) -> Iterator[None]:
    """End the conversion at once on SIGINT or SIGTERM, with a line that says how to go on. Raises Stopped."""

    def stop(number, _frame) -> None:
        raise _Stop(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except _Stop as stopped:
        raise Stopped(
            f"{stopped}; what is done is kept in {data_dir / '.converting'}: the same command goes on from there"
        ) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def writing_to(data_dir: Path) -> Iterator[None]:
    """Make the data folder. Raises DataError if it, or something in it, cannot be written."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise DataError(
            f"cannot write to {data_dir}: {error.strerror}; "
            + ("what is done is kept: make room and run the same command, or name" if full else "name")
            + " another folder with --data_dir"
        ) from error


@contextlib.contextmanager
def locked(work: Path) -> Iterator[None]:
    """Keep a second conversion out of the folder. The lock ends with the process that holds it. Raises DataError."""
    work.mkdir(exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another process is converting into {work.parent}; wait for it, or end it") from error
        yield


def publish(data_dir: Path, work: Path) -> None:
    """Give complete files their final names, the manifest last, so that a reader who sees it sees its files.

    The work folder's own manifest says that all is done: after an interruption, the next run only finishes this.
    """
    (data_dir / "manifest.json").unlink(missing_ok=True)
    for name in SPLITS:
        with contextlib.suppress(FileNotFoundError):
            (work / f"{name}.beton").rename(data_dir / f"{name}.beton")
    to_disk(data_dir)
    (work / "manifest.json").rename(data_dir / "manifest.json")
    to_disk(data_dir)
    shutil.rmtree(work)
