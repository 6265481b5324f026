"""Unpack a compressed archive into a tar in a scratch folder, and refuse files that are not readable archives."""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import hashlib
import lzma
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from lbsgd.disk import appearing, exists
from lbsgd.errors import DataError
from lbsgd.output import say
from lbsgd.units import size

MAX_EXPANSION = 100  # of a compressed tar: gzip reaches 1,000, images hardly more than 1
MIN_TAR_BYTES = 1 << 20  # allowed for any compressed tar: a small one holds mostly padding
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the errors of a full disk
ROOM = "while it is read; make room, or name another folder: with --data_dir, or TMPDIR where --data_dir is only read"
LONG_BYTES = 1 << 30  # an archive of more takes so long to read that we say so
CONTENT = (".tar", ".images")  # suffixes, in a scratch folder, of the content of an archive or of shards
Opener = Callable[..., IO[bytes]]
COMPRESSIONS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
UNPACK = "unpack it and name the folder with --source"
FETCH = "as you get when a download needs a login; fetch the archive again"
OTHERS = {  # the first bytes of files that people take for a tar -> what they are, what to do
    b"PK\x03\x04": ("a zip", UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", UNPACK),
    b"Rar!": ("a rar archive", UNPACK),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", UNPACK),
    b"\x89HDF": ("an HDF5 file", "name a folder or a tar of images with --source"),
    b"<!doctype": ("a web page", FETCH),
    b"<html": ("a web page", FETCH),
    b"<?xml": ("an error message in XML", FETCH),
    b"version https://git-lfs": ("a pointer of git-lfs", "run: git lfs pull"),
}


def refuse_other(path: Path, origin: Path | None = None) -> None:
    """Raise DataError if a file is known to be neither a tar nor a compressed tar.

    origin: the archive that the message names, if the file is its content.
    """
    start = first_bytes(path)
    for magic, (what, help_) in OTHERS.items():
        if start.lstrip().lower().startswith(magic.lower()):
            is_ = f"{origin} holds" if origin not in (None, path) else f"{path} is"
            raise DataError(f"{is_} {what}: {help_}" if help_ is UNPACK else f"{is_} {what}, {help_}")


def first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(64)


def version(path: Path) -> str:
    """Return a name that changes with a file's content."""
    info = path.stat()
    return f"{path.name}.{info.st_size}.{info.st_mtime_ns}"


def versions_digest(paths: Iterable[Path]) -> str:
    """Return a digest of the versions of files."""
    return hashlib.sha256("\n".join(map(version, paths)).encode(errors="surrogateescape")).hexdigest()


def say_if_long(what: str, *sources: Path) -> None:
    if sum(path.stat().st_size for path in sources) > LONG_BYTES:
        say(f"{what}: this takes minutes, from a slow disk longer")


def uncompressed(path: Path, scratch: Path) -> Path:
    """Return the path of a tar to read in place: the archive or, if it is compressed, its content in `scratch`.

    Raises DataError if the archive is damaged, not a tar, or too large for a data set.
    """
    refuse_other(path)
    decompress = decompressor(path)
    if decompress is None:
        return path
    tar = scratch / f"{version(path)}.tar"
    if not exists(tar):
        scratch.mkdir(parents=True, exist_ok=True)
        drop_content(scratch, rf"{re.escape(path.name)}\.\d+\.\d+\.tar(\.\d+\.\d+\.listing)?")  # of earlier versions
        num_bytes = path.stat().st_size
        require_room(scratch, path, num_bytes)  # images hardly compress
        say_if_long(f"uncompressing {path} into {scratch}", path)
        with appearing(tar) as partial, open(partial, "wb") as file:
            decompress_to(path, decompress, file, limit=max(MIN_TAR_BYTES, MAX_EXPANSION * num_bytes))
    return tar


def drop_content(scratch: Path, names: str) -> None:
    """Remove partial files of a killed process from the scratch folder, and files whose names match a regex.

    This is safe because only one process at a time uses the folder.
    """
    for path in [path for path in scratch.iterdir() if path.suffix == ".partial" or re.fullmatch(names, path.name)]:
        path.unlink()


def require_room(folder: Path, source: Path, num_bytes: int) -> None:
    """Raise DataError if a scratch folder's disk has less than num_bytes free."""
    if (free := shutil.disk_usage(folder).free) < num_bytes:
        raise DataError(
            f"{folder} has {size(free)} free, and the content of {source} needs about {size(num_bytes)} there {ROOM}"
        )


def content_in(scratch: Path) -> dict[str, int]:
    """Return the names and sizes of unpacked content in a scratch folder."""
    return {path.name: path.stat().st_size for path in scratch.iterdir() if path.suffix in CONTENT}


@contextlib.contextmanager
def telling_what_stays(scratch: Path) -> Iterator[None]:
    """Say how much content a refused command leaves in its hidden scratch folder, because it may be large."""
    try:
        yield
    except DataError:
        if kept := sum(content_in(scratch).values()):
            say(f"{scratch} keeps {size(kept)} of unpacked content for the next try; remove it if there will be none")
        raise


def no_room(folder: Path, source: Path, error: OSError) -> DataError | None:
    """Return what to say about the error of a full disk, or None for any other error."""
    if error.errno not in FULL:
        return None
    return DataError(f"{folder} has no room ({error.strerror}) for the content of {source} {ROOM}")


def decompressor(path: Path) -> Opener | None:
    start = first_bytes(path)
    return next((opened for magic, opened in COMPRESSIONS.items() if start.startswith(magic)), None)


def decompress_to(path: Path, decompress: Opener, file: IO[bytes], limit: int) -> None:
    try:
        with decompress(path, "rb") as source:
            while data := source.read(1 << 20):
                file.write(data)
                if file.tell() > limit:
                    raise DataError(
                        f"{path} holds more than {limit:,} bytes, which no data set would; unpack it yourself and "
                        f"name the folder with --source"
                    )
            file.flush()
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{path} cannot be read ({error}); it is truncated or damaged: fetch it again") from error
