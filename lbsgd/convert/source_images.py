"""A source's images in order, and their bytes, read in place."""

from __future__ import annotations

import errno
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lbsgd.convert.files import Files, Member, Names
from lbsgd.convert.left_out import LeftOut
from lbsgd.disk import is_file
from lbsgd.errors import DataError

SPLITS = ("train", "val")
BLOCK = 1 << 12  # rows turned into bytes at a time
OPEN_SHARDS = 64  # at a time, in each process


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one split, in the order of torchvision's ImageFolder: class by class, sorted by name."""

    container: Path  # a folder, or a tar
    classes: list[str]
    files: Files  # of the container, in any order, including those of the other split
    rows: np.ndarray  # uint32, the images' rows in files
    labels: np.ndarray  # uint32
    sizes: np.ndarray  # uint32, bytes
    origin: str  # the container's name for people
    shard_names: Sequence[str] = ()  # files in the container that hold the images; empty if each image is a file
    copied_from: Sequence[str] = ()  # shards whose images the container holds
    counted_as: str = ""  # what an image is called with its number in a shard; empty if names do not repeat in a shard
    stamp: int | None = None  # a tar's time of modification, for all its members
    left_out: LeftOut = field(default_factory=LeftOut)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def names(self) -> Names:
        """The names within the container."""
        return self.files.names.of_rows(self.rows)

    @property
    def offsets(self) -> np.ndarray:
        """Where each image's first byte lies in its tar or shard, uint64; 0 in a folder."""
        return self.files.taken("offsets", self.rows)

    @property
    def stamps(self) -> np.ndarray:
        """Times of modification, int64."""
        if self.stamp is not None:
            return np.broadcast_to(np.int64(self.stamp), len(self))
        return self.files.taken("stamps", self.rows)

    def member(self, index: int) -> Member:
        return self.files.member(int(self.rows[index]))

    def where(self, index: int) -> str:
        """Return the name of image `index` for people."""
        return f"{self.origin}/{self.within(index)}"

    def within(self, index: int) -> str:
        """Return the place of image `index` in the source: its path, or its shard, name and number in the shard."""
        member = self.member(index)
        shards = self.shard_names or self.copied_from
        place = f"{shards[member.shard]}/{member.name}" if shards else member.name
        if not self.counted_as:
            return place
        first = int(np.searchsorted(self.files.column("shards"), member.shard))  # of the shard's consecutive rows
        return f"{place} ({self.counted_as} {int(self.rows[index]) - first})"

    def digest(self, *columns: np.ndarray) -> str:
        """Return a digest of the classes, names, labels and sizes, and of further columns."""
        digest = hashlib.sha256("\n".join([*self.classes, ""]).encode(errors="surrogateescape"))
        all_names = self.names
        for block in blocks(len(self)):
            names = "".join(f"\n{all_names[index]}" for index in block)
            digest.update(names.encode(errors="surrogateescape"))
        for column in (self.labels, self.sizes, *columns):
            _update(digest, column)
        return digest.hexdigest()

    def reader(self) -> ImageReader:
        """Return a reader of these images. Each process needs its own."""
        return ImageReader(self.container, self.shard_names)


def _update(digest: hashlib._Hash, column: np.ndarray) -> None:
    for block in blocks(len(column)):
        digest.update(column[block.start : block.stop].astype(np.int64).data)


def blocks(num_rows: int, most: int = BLOCK) -> Iterator[range]:
    """Yield the numbers of the rows, at most `most` at a time."""
    return (range(at, min(at + most, num_rows)) for at in range(0, num_rows, most))


@dataclass(frozen=True, eq=False)
class Source:
    """The user's data set: its path and the images of its two splits."""

    path: Path
    train: Images
    val: Images
    version: str = ""  # of the archives or shards, see `sources.source_version`

    def __len__(self) -> int:
        return len(self.train) + len(self.val)

    @property
    def splits(self) -> dict[str, Images]:
        return {"train": self.train, "val": self.val}

    def digest(self) -> str:
        """Return a digest of all names, labels and sizes, the manifest's `listing`."""
        return f"{self.train.digest():.32}{self.val.digest():.32}"

    def stamps_digest(self) -> str:
        """Return a digest of all times of modification, the manifest's `stamps`."""
        digest = hashlib.sha256()
        for images in self.splits.values():
            _update(digest, images.stamps)
        return digest.hexdigest()


class Stretch(io.RawIOBase):
    """A part of an open file, as a file object. Closing it closes the open file."""

    def __init__(self, descriptor: int, start: int, num_bytes: int) -> None:
        self.descriptor, self.start, self.num_bytes, self.position = descriptor, start, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.num_bytes}[whence]
        if position < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.position = position
        return position

    def readinto(self, buffer: Any) -> int:
        left = max(0, self.num_bytes - self.position)
        data = os.pread(self.descriptor, min(len(buffer), left), self.start + self.position)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            os.close(self.descriptor)
        super().close()


class ImageReader:
    """Reads the bytes of a split's images."""

    def __init__(self, container: Path, shard_names: Sequence[str] = ()) -> None:
        self.container, self.shard_names = str(container), shard_names
        self.is_file = is_file(container)
        self._open: dict[str, int] = {}  # descriptors of the shards by path

    def read(self, member: Member) -> bytes:
        """Return an image's bytes. Raises DataError if the file has changed since the source was listed."""
        shard = self._shard(member)
        path = shard or f"{self.container}/{member.name}"
        try:
            data = os.pread(self._descriptor(shard), member.num_bytes, member.offset) if shard else _content(path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        if len(data) != member.num_bytes:
            place = f"{path}: {member.name}" if shard else path
            raise DataError(
                f"{place} has changed while it was read: {len(data):,} bytes, not {member.num_bytes:,}; run the same "
                f"command again"
            )
        return data

    def file(self, member: Member) -> io.BufferedReader:
        """Return an image as a file that reads only what is asked for. Raises DataError if it cannot be opened."""
        shard = self._shard(member)
        path = shard or f"{self.container}/{member.name}"
        try:
            stretch = Stretch(os.open(path, os.O_RDONLY), member.offset, member.num_bytes)
            return io.BufferedReader(stretch, 8192)  # Python 3.14 would read 128 KiB at a time
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error

    def _shard(self, member: Member) -> str | None:
        """Return the path of the tar or shard that holds the image, or None if the image is a file of its own."""
        if self.shard_names:
            return f"{self.container}/{self.shard_names[member.shard]}"
        return self.container if self.is_file else None

    def _descriptor(self, shard: str) -> int:
        if shard not in self._open:
            if len(self._open) == OPEN_SHARDS:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = os.open(shard, os.O_RDONLY)
        return self._open[shard]


def _content(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()
