"""A conversion's work folder, and the data folder, in which its result appears complete or not at all.

data folder/.converting/    identity.json  the conversion that the work is for; work for any other is dropped
                            train.beton, val.beton with a .journal each (see beton_writer.py)
                            manifest.json  once all files are finished: from then on only their names are missing
                            *.tar, *.images    the content of a compressed source
                            *.listing          the members of a tar, or of shards
                            lock               of the command that works here
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from lbsgd.convert.compressed import FULL
from lbsgd.convert.image import libraries
from lbsgd.convert.settings import Settings
from lbsgd.convert.source_images import SPLITS, Source
from lbsgd.data.beton import BetonFile
from lbsgd.data.folder import Manifest
from lbsgd.disk import HELD, exists, is_still_at, read_note, replace_file, to_disk
from lbsgd.errors import DataError
from lbsgd.output import say

ABSENT = (FileNotFoundError, NotADirectoryError)
CONVERTER_VERSION = 3  # raise it when the same source and settings would give other files


# --- the conversion that the work is for ------------------------------------------------------------------------------


def conversion_identity(source: Source, settings: Settings) -> dict[str, object]:
    """Return everything that the result's bytes depend on. Work for another identity cannot be reused."""
    return {
        "settings": asdict(settings),
        "converter_version": CONVERTER_VERSION,
        "libraries": libraries(),
        "images": [images.digest(images.offsets, images.stamps) for images in source.splits.values()],
    }


def _read_identity(work: Path) -> dict[str, Any] | None:
    path = work / "identity.json"
    try:
        return read_note(path)
    except (*ABSENT, ValueError):
        return None
    except OSError as error:  # the work may still be the right one
        raise DataError(f"cannot read {path}: {error.strerror}") from error


@contextlib.contextmanager
def damage_passed_over() -> Iterator[None]:
    """Ignore a DataError about damaged or missing files, which are made again, but not about unreadable ones."""
    try:
        yield
    except DataError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, ABSENT):
            raise


def is_partly_published(data_dir: Path, work: Path, identity: Mapping[str, object]) -> bool:
    """Return whether an earlier run finished all files and was interrupted while giving them their final names.

    Each file must still be in one of the two folders, because it may have been removed meanwhile.
    """
    if _read_identity(work) != identity or not exists(work / "manifest.json"):
        return False
    with damage_passed_over():
        manifest = Manifest.read(work / "manifest.json")
        return all(getattr(manifest, name).describes(_finished(data_dir, work, name)) for name in SPLITS)
    return False


def _finished(data_dir: Path, work: Path, name: str) -> BetonFile:
    place = work if exists(work / f"{name}.beton") else data_dir
    return BetonFile.open(place / f"{name}.beton")


def start_over_if_other(work: Path, identity: Mapping[str, object], source: Source) -> None:
    """Drop another conversion's work, and finished work that lacks a part. Keep the content of the source."""
    if same := _read_identity(work) == identity:
        if not exists(work / "manifest.json"):
            return
        say(f"{work} has lost files that were finished: it begins again")
    if any(work.glob("*.journal")) and not same:
        say(f"{work} holds work on other images or settings, or of another version: it begins again")
    for name in ("identity.json", "manifest.json"):  # first, so that partial work never passes for complete work
        (work / name).unlink(missing_ok=True)
    in_use = [work / "lock", *(images.container for images in source.splits.values())]
    for path in work.iterdir():
        if path not in in_use and path.suffix != ".listing":
            path.unlink()
    to_disk(work)  # so that no old journal reappears next to the new identity if the machine dies
    replace_file(work / "identity.json", json.dumps(identity).encode())


# --- the data folder --------------------------------------------------------------------------------------------------


NOTHING_KEPT = "nothing of it is kept: the same command begins again"  # said if a dry run or --verify is stopped


@contextlib.contextmanager
def writing_to(data_dir: Path) -> Iterator[None]:
    """Make the data folder, and remove it if it stays empty.

    Raises DataError if the folder or something in it cannot be written, or if a file elsewhere cannot be used.
    """
    made: list[Path] = []
    try:
        made += [folder for folder in (data_dir, *data_dir.parents) if not exists(folder)]
        data_dir.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if _is_elsewhere(error.filename, data_dir):
            help_ = "mend it, and the same command goes on"
            raise DataError(f"cannot use {error.filename}: {error.strerror}; {help_}") from error
        full, in_the_way = error.errno in FULL, isinstance(error, FileExistsError)
        raise DataError(
            f"cannot write to {data_dir}: {os.strerror(errno.ENOTDIR) if in_the_way else error.strerror}; "
            + ("what is done is kept: make room and run the same command, or name" if full else "name")
            + " another folder with --data_dir"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def _is_elsewhere(name: Any, data_dir: Path) -> bool:
    """Return whether the file that an error names lies neither in the data folder nor above it."""
    if not isinstance(name, str):
        return False
    place, folder = Path(os.path.abspath(name)), Path(os.path.abspath(data_dir))
    return not (place.is_relative_to(folder) or folder.is_relative_to(place))


@contextlib.contextmanager
def converting_alone(work: Path) -> Iterator[None]:
    """Make the work folder and lock it. Remove it if nothing is left in it. Raises DataError if it is already locked.

    The lock ends with this process, because the decoding processes do not inherit a lockf lock. They would inherit the
    flock of `disk.locked`.
    """
    with _locked_file(work) as lock:
        try:
            yield
        finally:
            if is_still_at(work / "lock", lock) and [path.name for path in work.iterdir()] == ["lock"]:
                remove_work(work)


def _locked_file(work: Path) -> IO[str]:
    """Return the lock that other processes also find. The last holder may have removed the folder meanwhile."""
    while True:
        work.mkdir(parents=True, exist_ok=True)
        try:
            lock = open(work / "lock", "w")
        except FileNotFoundError:
            continue
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                lock.close()
                raise _held(work) from error
            no_locks = f"{work.parent} lies on a file system without locks ({error.strerror})"
            say(f"{no_locks}: see to it that no other command converts into it meanwhile")
        if is_still_at(work / "lock", lock):
            return lock
        lock.close()


def refuse_if_held(work: Path) -> None:
    """Raise DataError if another process is converting. Writes nothing, so the folder may be read-only or absent."""
    with contextlib.suppress(OSError), open(work / "lock") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                raise _held(work) from error


def _held(work: Path) -> DataError:
    return DataError(f"another process is converting into {work.parent}; wait for it, or end it")


def remove_added(work: Path, there: set[Path]) -> None:
    """Remove what this command has added to the work folder. The rest may be another command's work."""
    for path in set(work.iterdir()) - there:
        path.unlink()


def remove_work(work: Path) -> None:
    """Remove the work folder, the lock last. After that, another process may make a new folder of this name."""
    for path in work.iterdir():
        if path.name != "lock":
            path.unlink()
    (work / "lock").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        work.rmdir()


def publish(data_dir: Path, work: Path) -> None:
    """Give complete files their final names, the manifest last, so that a reader who sees it also sees its files.

    All old files are removed before the first new one appears, so that the folder never mixes the two. The work
    folder's own manifest says that all is done, so after an interruption the next run only finishes this step.
    """
    waiting = [f"{name}.beton" for name in SPLITS if exists(work / f"{name}.beton")]
    for name in (*waiting, "manifest.json"):
        (data_dir / name).unlink(missing_ok=True)
    to_disk(data_dir)
    for name in waiting:
        (work / name).rename(data_dir / name)
    to_disk(data_dir)
    (work / "manifest.json").rename(data_dir / "manifest.json")
    to_disk(data_dir)
    remove_work(work)
