"""List where a tar's members lie, so that they are read in place. Nothing is unpacked to a name from an archive.

A member is refused if it is not a plain file or folder, if its path leaves the archive, or if it is too large to belong
in a data set of images. The message names the member. A hard link counts as the file that it names.
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from lbsgd.convert.compressed import decompress_to, decompressor, refuse_other, say_if_long, version
from lbsgd.convert.files import Files, Names
from lbsgd.convert.left_out import path_reason
from lbsgd.errors import DataError

MAX_IMAGE_BYTES = 1 << 28  # 256 MiB; ImageNet's largest file has 15 MB
MAX_CLASS_BYTES = 1 << 36  # 64 GiB, for the tar of one class within a tar
MAX_DEVKIT_BYTES = 1 << 26  # 64 MiB, for one file of the devkit
MAX_DEVKIT_TAR_BYTES = 1 << 28  # 256 MiB, for the devkit's archive, uncompressed
MOST_PADDING = 1 << 20  # 1 MiB of zeros after the end of a tar; tar itself writes at most 10 kB, unless told otherwise
MAX_HEADER_BYTES = 1 << 20  # 1 MiB, for one read of tarfile, which reads only names and attributes
TRUNCATED = "reaches beyond the end of the archive, which is truncated"


def cached_members(path: Path, scratch: Path, origin: Path | None = None) -> Files:
    """Return members(), cached in `scratch`: reading a million headers takes a minute, or hours on a slow disk."""
    cache = scratch / f"{version(path)}.listing"
    return listed_once(cache, lambda: members(path, origin), f"listing what {origin or path} holds", [path])


def listed_once(cache: Path, make: Callable[[], Files], what: str, sources: list[Path]) -> Files:
    """Return the listing kept at `cache`, or make and keep it. If the sources are large, say that this takes long."""
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return Files.load(cache)
    say_if_long(what, *sources)
    found = make()
    cache.parent.mkdir(parents=True, exist_ok=True)
    found.save(cache)
    return found


def members(path: Path, origin: Path | None = None) -> Files:
    """Return a tar's plain files, in the tar's order. Inner tars are replaced by their files. Hard links come last.

    origin: the archive that messages name, which may be compressed. Raises DataError for a refused or damaged archive.
    """
    refuse_other(path, origin)
    found, links = Files("offsets"), _HardLinks()
    with open(path, "rb") as file:
        for name, offset, num_bytes in _members(_Part(file, 0, path.stat().st_size), origin or path, "", links):
            found.add(name, offsets=offset, sizes=num_bytes)
    links.add_to(found, origin or path)
    return found


class _HardLinks:
    """Members that are further names of a file: tar stores a file with several names once."""

    def __init__(self) -> None:
        self.names, self.targets = Names(), Names()

    def append(self, name: str, target: str) -> None:
        self.names.append(name)
        self.targets.append(target)

    def add_to(self, found: Files, path: Path) -> None:
        """Add each link as the file that it names. Raises DataError if the archive does not hold that file."""
        wanted = set(self.targets)
        rows = {name: row for row, name in enumerate(found.names) if name in wanted} if wanted else {}
        for name, target in zip(self.names, self.targets, strict=True):
            if target not in rows:
                raise _refused(path, name, f"is a link to {target!r}, which the archive does not hold as a file")
            file = found.member(rows[target])
            rows[name] = len(found)
            found.add(name, offsets=file.offset, sizes=file.num_bytes)


def _members(part: _Part, path: Path, within: str, links: _HardLinks) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, number of bytes) of each file, and collect the links."""
    for info in _checked(part, path, within):
        name = within + info.name
        if info.islnk():
            links.append(name, within + posixpath.normpath(info.linkname))
            continue
        # In ImageNet's training archive, n01440764.tar holds n01440764_18.JPEG and others. ._n01440764.tar is no tar.
        if name.endswith(".tar") and not path_reason(f"{name}.jpg"):
            if within:
                raise _refused(path, name, "is a tar in a tar in a tar")
            inner = _Part(part.file, part.start + info.offset_data, info.size)
            yield from _members(inner, path, name.removesuffix(".tar") + "/", links)
        elif info.size > MAX_IMAGE_BYTES:
            raise _refused(path, name, f"is larger than {MAX_IMAGE_BYTES:,} bytes")
        else:
            yield name, part.start + info.offset_data, info.size


def _checked(part: _Part, path: Path, within: str) -> Iterator[tarfile.TarInfo]:
    """Yield the plain files and hard links of one tar, with doubled slashes and dots removed from their paths."""
    after = f" in {within}" if within else ""
    try:
        with tarfile.open(fileobj=part, mode="r:") as tar:
            for info in tar:
                _check(info, path, within)
                info.name = posixpath.normpath(info.name)
                if info.isfile() and info.offset_data + info.size > part.num_bytes:
                    raise _refused(path, within + info.name, TRUNCATED)
                if info.isfile() or info.islnk():
                    yield info
                after = f" after member {within + info.name!r}"
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them, a kilobyte each
            part.seek(tar.offset)  # where tarfile saw the end: it also takes half a header for the end
            if (end := part.read(tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(WHY_IT_ENDS.get(len(end), "it ends within a header"))
            if _begins_another(part):
                raise DataError(
                    f"{path} goes on with another archive after its end{after}, as `cat` joins them, and only the "
                    "first would be read; unpack them and name the folder with --source"
                )
    except DataError:
        raise
    except (tarfile.TarError, EOFError, ValueError) as error:  # ValueError: a sparse member's header lacks a number
        advice = "it is truncated or damaged: fetch it again" if after else "name a folder or a tar, or fetch it again"
        raise DataError(f"{path} cannot be read as a tar ({error}{after}); {advice}") from error


def _begins_another(part: _Part) -> bool:
    """Return whether another tar begins after the zeros at the end of one, as after `cat a.tar b.tar`."""
    for _ in range(MOST_PADDING // tarfile.BLOCKSIZE):
        block = part.read(tarfile.BLOCKSIZE)
        if block == bytes(tarfile.BLOCKSIZE):
            continue
        try:
            tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:  # the end of the file, or no tar
            return False
        return True
    return False


def _check(info: tarfile.TarInfo, path: Path, within: str) -> None:
    name = PurePosixPath(info.name)
    if name.is_absolute() or ".." in name.parts:
        raise _refused(path, within + info.name, "is a path that leads out of the archive")
    if info.issym():
        raise _refused(path, within + info.name, "is a symbolic link")
    if not (info.isfile() or info.islnk() or info.isdir()) or info.issparse():
        raise _refused(path, within + info.name, "is not a plain file or folder")
    if info.size < 0:  # tarfile would loop forever
        raise _refused(path, within + info.name, "has a size below zero")
    if info.size > MAX_CLASS_BYTES:
        raise _refused(path, within + info.name, f"is larger than {MAX_CLASS_BYTES:,} bytes")


def _refused(path: Path, name: str, reason: str) -> DataError:
    return DataError(
        f"{path}: member {name!r} {reason}; an archive of images has no such member: use another one, or "
        f"unpack it yourself and name the folder with --source"
    )


WHY_IT_ENDS = {  # by the number of bytes found instead of a block of zeros
    0: "it ends without the zeros that a whole tar has there",
    tarfile.BLOCKSIZE: "a header is damaged",
}


class _Part(io.RawIOBase):
    """A part of a file, as a file object. tarfile reads only headers from it."""

    def __init__(self, file: IO[bytes], start: int, num_bytes: int) -> None:
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


def read_members(path: Path, endings: list[str]) -> list[bytes]:
    """Return the first member with each ending from a small tar such as ImageNet's devkit, compressed or not."""
    found: dict[str, bytes] = {}
    with tempfile.TemporaryFile() as file:
        decompress_to(path, decompressor(path) or open, file, limit=MAX_DEVKIT_TAR_BYTES)
        for info in _checked(_Part(file, 0, file.tell()), path, ""):
            ending = next((ending for ending in endings if info.name.endswith(ending)), None)
            if info.islnk():
                raise _refused(path, info.name, f"is a link to {info.linkname!r}")
            if ending and info.size > MAX_DEVKIT_BYTES:
                raise _refused(path, info.name, f"is larger than {MAX_DEVKIT_BYTES:,} bytes")
            if ending:
                found.setdefault(ending, os.pread(file.fileno(), info.size, info.offset_data))
    if len(found) < len(endings):
        raise DataError(f"{path} holds no {' and no '.join(ending for ending in endings if ending not in found)}")
    return [found[ending] for ending in endings]
