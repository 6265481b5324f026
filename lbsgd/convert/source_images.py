"""The images of a source in their order, and how their bytes are read."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
    stamps: np.ndarray  # int64, when each was modified
    origin: str  # what a person would call the container

    def __len__(self) -> int:
        return len(self.names)

    def where(self, index: int) -> str:
        """What a person would call image `index`."""
        return f"{self.origin}/{self.names[index]}"

    def listing(self, *columns: np.ndarray) -> str:
        """A digest of the classes, names, labels and sizes, and of further columns."""
        digest = hashlib.sha256("\n".join([*self.classes, "", *self.names]).encode(errors="surrogateescape"))
        for column in (self.labels, self.sizes, *columns):
            digest.update(np.ascontiguousarray(column))
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Source:
    path: Path
    train: Images
    val: Images


class Files:
    """Reads the bytes of images; one for each process."""

    def __init__(self, container: Path) -> None:
        self.container = str(container)
        self.tar = os.open(container, os.O_RDONLY) if container.is_file() else None

    def read(self, name: str, offset: int, num_bytes: int) -> bytes:
        """Raises DataError where the file is not what it was when the source was listed."""
        path = self.container if self.tar is not None else f"{self.container}/{name}"
        try:
            if self.tar is not None:
                data = os.pread(self.tar, num_bytes, offset)
            else:
                with open(path, "rb", buffering=0) as file:
                    data = file.read()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        if len(data) != num_bytes:
            what = path if self.tar is None else f"{path}: {name}"
            raise DataError(
                f"{what} has changed while it was read: {len(data):,} bytes, not {num_bytes:,}; run the same "
                f"command again"
            )
        return data
