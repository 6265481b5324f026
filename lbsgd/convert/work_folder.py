"""The folder that a conversion works in, and the data folder that its result appears in: complete, or not there.

data folder/.converting/    identity.json  what the work in it is for; work for anything else is dropped
                            train.beton, val.beton with a .journal each (see writer.py)
                            manifest.json  once all files are finished: from then on only their names are missing
                            *.tar          what a compressed source holds; *.listing  what lies where in a tar
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from lbsgd.convert import image as jpeg
from lbsgd.convert.image import Settings
from lbsgd.convert.sources import SPLITS, Source
from lbsgd.data.beton import BetonFile
from lbsgd.data.folder import Manifest, Split
from lbsgd.disk import replace_file, to_disk
from lbsgd.errors import DataError, Stopped

CONVERTER_VERSION = 2  # to be raised when the same source and settings would give other files


# --- what is there already --------------------------------------------------------------------------------------------


def identity(source: Source, settings: Settings) -> dict[str, object]:
    """All that the bytes of the result depend on; work that was done for another one is of no use."""
    splits = [getattr(source, name) for name in SPLITS]
    return {
        "settings": asdict(settings),
        "converter_version": CONVERTER_VERSION,
        "libraries": jpeg.libraries(),
        "images": [images.listing(images.offsets, images.stamps) for images in splits],
    }


def is_published_by_half(work: Path, wanted: dict) -> bool:
    """Whether an earlier run had finished all files and was interrupted while it gave them their names."""
    return (work / "manifest.json").exists() and _read_identity(work) == wanted


def _read_identity(work: Path) -> dict | None:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((work / "identity.json").read_bytes())


def start_over_if_other(work: Path, wanted: dict) -> None:
    if _read_identity(work) == wanted:
        return
    for path in work.iterdir():
        if path.name != "lock" and path.suffix not in (".tar", ".listing"):
            path.unlink()
    replace_file(work / "identity.json", json.dumps(wanted).encode())


def listing(source: Source) -> str:
    return f"{source.train.listing():.32}{source.val.listing():.32}"


def is_complete(data_dir: Path, source: Source, settings: Settings) -> bool:
    """Whether the folder already holds what this conversion would make; DataError where it holds something else."""
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
        "names or sizes of images": listing(source) == manifest.listing,
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
    """No Exception, which those who expect anything of PIL's decoders would catch."""


@contextlib.contextmanager
def stoppable(data_dir: Path) -> Iterator[None]:
    """SIGINT and SIGTERM end the conversion at once, with a line that says how to go on."""

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
    """Two conversions into one folder would spoil each other's work. The lock ends with the process that holds it."""
    work.mkdir(exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DataError(f"another process is converting into {work.parent}; wait for it, or end it") from error
        yield


def publish(data_dir: Path, work: Path) -> None:
    """Gives complete files their final names; a reader that sees the manifest sees the files it was written for.

    From here on the work folder's own manifest says that all is done, and an interrupted run only finishes this.
    """
    (data_dir / "manifest.json").unlink(missing_ok=True)
    for name in SPLITS:
        with contextlib.suppress(FileNotFoundError):
            (work / f"{name}.beton").rename(data_dir / f"{name}.beton")
    to_disk(data_dir)
    (work / "manifest.json").rename(data_dir / "manifest.json")
    to_disk(data_dir)
    shutil.rmtree(work)
