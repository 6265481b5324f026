"""Archives as data: what lies where in a tar, read in place; nothing is ever unpacked to a name from an archive.

A member is refused by its name if it is not a plain file or folder, if its path leaves the archive, or if it is larger
than anything that belongs in a data set of images.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lbsgd.disk import replace_file
from lbsgd.errors import DataError

MAX_IMAGE_BYTES = 1 << 28  # 256 MiB; ImageNet's largest file has 15 MB
MAX_CLASS_BYTES = 1 << 36  # 64 GiB, a tar of one class within a tar
MAX_DEVKIT_BYTES = 1 << 26  # 64 MiB, a file of the devkit
MAX_DEVKIT_TAR_BYTES = 1 << 28  # 256 MiB, the devkit's archive, uncompressed
MAX_HEADER_BYTES = 1 << 20  # 1 MiB, what tarfile reads of an archive in one piece: names and attributes
MAX_EXPANSION = 100  # a compressed tar may be this many times its size: gzip's utmost is 1,000, an image's share near 1
MIN_TAR_BYTES = 1 << 20  # and a small one may have this many bytes: mostly padding
LONG_BYTES = 1 << 30  # of an archive that takes so long to go through that a person should be told
COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


class Member(NamedTuple):
    name: str  # in the archive; class/name for what is in a tar in a tar
    offset: int  # of its first byte, in the outermost file
    num_bytes: int


def listing(path: Path, scratch: Path) -> list[Member]:
    """members(), remembered in the folder scratch: a million headers are read in a minute, from a slow disk in hours."""
    cache = scratch / f"{_version(path)}.listing"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return [Member(*entry) for entry in json.loads(cache.read_bytes())]
    _say_if_long(f"listing what {path} holds", path)
    found = members(path)
    scratch.mkdir(parents=True, exist_ok=True)
    replace_file(cache, json.dumps(found).encode())
    return found


def _say_if_long(what: str, path: Path) -> None:
    if path.stat().st_size > LONG_BYTES:
        print(f"{what}: this takes minutes, from a slow disk longer", flush=True)


def _version(path: Path) -> str:
    info = path.stat()
    return f"{path.name}.{info.st_size}.{info.st_mtime_ns}"


def members(path: Path) -> list[Member]:
    """All plain files of a tar, in its order; those of tars within it in their places. Raises DataError."""
    with open(path, "rb") as file:
        return list(_members(_Part(file, 0, path.stat().st_size), path, ""))


def _members(part: _Part, path: Path, within: str) -> Iterator[Member]:
    for info in _checked(part, path, within):
        name = within + info.name.removeprefix("./")
        if name.endswith(".tar"):  # of ImageNet's training images: n01440764.tar holds n01440764_18.JPEG and others
            if within:
                raise _refused(path, name, "is a tar in a tar in a tar")
            inner = _Part(part.file, part.start + info.offset_data, info.size)
            yield from _members(inner, path, name.removesuffix(".tar") + "/")
        elif info.size > MAX_IMAGE_BYTES:
            raise _refused(path, name, f"is larger than {MAX_IMAGE_BYTES:,} bytes")
        else:
            yield Member(name, part.start + info.offset_data, info.size)


def _checked(part: _Part, path: Path, within: str) -> Iterator[tarfile.TarInfo]:
    """The plain files of one tar."""
    after = f" in {within}" if within else ""
    try:
        with tarfile.open(fileobj=part, mode="r:") as tar:
            for info in tar:
                _check(info, path, within)
                if info.offset_data + info.size > part.num_bytes:
                    raise _refused(
                        path, within + info.name, "reaches beyond the end of the archive, which is truncated"
                    )
                if info.isfile():
                    yield info
                after = f" after member {within + info.name!r}"
                tar.members = []  # which tarfile would keep, a kilobyte each
            part.seek(tar.offset)  # where tarfile saw the end: it takes half a header for one as well
            if part.read(tarfile.BLOCKSIZE) not in (b"", bytes(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError("it ends within a header")
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{path} cannot be read as a tar ({error}{after}); it is truncated or damaged: fetch it again"
        ) from error


def _check(info: tarfile.TarInfo, path: Path, within: str) -> None:
    name = PurePosixPath(info.name)
    if name.is_absolute() or ".." in name.parts:
        raise _refused(path, within + info.name, "is a path that leads out of the archive")
    if info.issym() or info.islnk():
        raise _refused(path, within + info.name, "is a link")
    if not (info.isfile() or info.isdir()) or info.issparse():
        raise _refused(path, within + info.name, "is not a plain file or folder")
    if info.size < 0:  # which tarfile would go round in circles with
        raise _refused(path, within + info.name, "has a size below zero")
    if info.size > MAX_CLASS_BYTES:
        raise _refused(path, within + info.name, f"is larger than {MAX_CLASS_BYTES:,} bytes")


def _refused(path: Path, name: str, reason: str) -> DataError:
    return DataError(
        f"{path}: member {name!r} {reason}; an archive of images has no such member: use another one, or "
        f"unpack it yourself and name the folder with --source"
    )


class _Part(io.RawIOBase):
    """A stretch of a file as a file of its own, of which tarfile reads the headers."""

    def __init__(self, file: io.BufferedReader, start: int, num_bytes: int) -> None:
        self.file, self.start, self.num_bytes, self.position = file, start, num_bytes, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.num_bytes}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, num_bytes: int = -1) -> bytes:
        if not (0 <= num_bytes <= MAX_HEADER_BYTES and self.position >= 0):
            raise tarfile.ReadError(f"a header of {num_bytes:,} bytes at {self.position:,}")
        left = max(0, self.num_bytes - self.position)
        data = os.pread(self.file.fileno(), min(num_bytes, left), self.start + self.position)
        self.position += len(data)
        return data


def uncompressed(path: Path, scratch: Path) -> Path:
    """The archive itself or, as a compressed one cannot be read in place, what it holds as a tar in the folder scratch."""
    decompress = _decompressor(path)
    if decompress is None:
        return path
    tar = scratch / f"{_version(path)}.tar"
    if not tar.exists():
        scratch.mkdir(parents=True, exist_ok=True)
        for left in scratch.glob("*.partial"):  # by a process that was killed
            if not Path("/proc", left.stem).exists():
                left.unlink(missing_ok=True)
        partial = scratch / f"{os.getpid()}.partial"
        _say_if_long(f"uncompressing {path} into {scratch}", path)
        try:
            with open(partial, "wb") as file:
                _decompress(path, decompress, file, limit=max(MIN_TAR_BYTES, MAX_EXPANSION * path.stat().st_size))
            partial.rename(tar)
        finally:
            partial.unlink(missing_ok=True)
    return tar


def _decompressor(path: Path):
    with open(path, "rb") as file:
        start = file.read(6)
    return next((opened for magic, opened in COMPRESSIONS.items() if start.startswith(magic)), None)


def _decompress(path: Path, decompress, file: io.BufferedWriter, limit: int) -> None:
    try:
        with decompress(path, "rb") as source:
            while data := source.read(1 << 20):
                file.write(data)
                if file.tell() > min(limit, shutil.disk_usage(file.name).free):
                    raise DataError(
                        f"{path} holds more than {limit:,} bytes, which no data set would, or more than "
                        f"the disk has room for; unpack it yourself and name the folder with --source"
                    )
            file.flush()
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{path} cannot be read ({error}); it is truncated or damaged: fetch it again") from error


def read_members(path: Path, endings: list[str]) -> list[bytes]:
    """The first small member with each ending of a compressed or plain tar, such as ImageNet's devkit."""
    found = {}
    with tempfile.TemporaryFile() as file:
        _decompress(path, _decompressor(path) or open, file, limit=MAX_DEVKIT_TAR_BYTES)
        for info in _checked(_Part(file, 0, file.tell()), path, ""):
            ending = next((ending for ending in endings if info.name.endswith(ending)), None)
            if ending and info.size > MAX_DEVKIT_BYTES:
                raise _refused(path, info.name, f"is larger than {MAX_DEVKIT_BYTES:,} bytes")
            if ending:
                found.setdefault(ending, os.pread(file.fileno(), info.size, info.offset_data))
    if len(found) < len(endings):
        raise DataError(f"{path} holds no {' and no '.join(ending for ending in endings if ending not in found)}")
    return [found[ending] for ending in endings]
