"""The images of a source in their order, and their bytes, read in place."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lbsgd.convert.archives import Member
from lbsgd.errors import DataError

SPLITS = ("train", "val")


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one split, in the order of torchvision's ImageFolder: class by class, sorted by name."""

    container: Path  # a folder, or a tar
    classes: list[str]
    names: list[str]  # within the container
    labels: np.ndarray  # int64
    offsets: np.ndarray  # int64, of the first byte in the tar; 0 in a folder
    sizes: np.ndarray  # int64, bytes
    stamps: np.ndarray  # int64, times of modification
    origin: str  # the container as a person would call it

    def __len__(self) -> int:
        return len(self.names)

    def member(self, index: int) -> Member:
        return Member(self.names[index], int(self.offsets[index]), int(self.sizes[index]))

    def where(self, index: int) -> str:
        """Return image `index` as a person would call it."""
        return f"{self.origin}/{self.names[index]}"

    def digest(self, *columns: np.ndarray) -> str:
        """Return a digest of the classes, names, labels and sizes, and of further columns."""
        digest = hashlib.sha256("\n".join([*self.classes, "", *self.names]).encode(errors="surrogateescape"))
        for column in (self.labels, self.sizes, *columns):
            digest.update(np.ascontiguousarray(column).data)
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Source:
    """The user's data set: its path and the images of both splits: where it is, and the images of its two splits."""

    path: Path
    train: Images
    val: Images

    def __len__(self) -> int:
        return len(self.train) + len(self.val)

    @property
    def splits(self) -> dict[str, Images]:
        return {"train": self.train, "val": self.val}

    def digest(self) -> str:
        """Return a digest of all names, labels and sizes, the manifest's `listing`."""
        return f"{self.train.digest():.32}{self.val.digest():.32}"


class ImageReader:
    """Reads the bytes of a split's images; one for each process."""

    def __init__(self, container: Path) -> None:
        self.container = str(container)
        self.tar = os.open(container, os.O_RDONLY) if container.is_file() else None

    def read(self, member: Member) -> bytes:
        """Return the bytes of an image. Raises DataError if the file is not what it was when the source was listed."""
        path = f"{self.container}/{member.name}" if self.tar is None else self.container
        try:
            data = _content(path) if self.tar is None else os.pread(self.tar, member.num_bytes, member.offset)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        if len(data) != member.num_bytes:
            place = path if self.tar is None else f"{path}: {member.name}"
            raise DataError(
                f"{place} has changed while it was read: {len(data):,} bytes, not {member.num_bytes:,}; run the same "
                f"command again"
            )
        return data


def _content(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()
