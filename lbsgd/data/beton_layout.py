"""Read an FFCV file's header and field descriptors, and verify the places of its tables against the file's size.

Neither time nor memory grows with the number of images.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lbsgd.data.beton_format import (
    ALLOCATION,
    CHECKSUM,
    FIELD,
    FORMAT_VERSION,
    HEADER,
    IMAGE_FIELD,
    INT_FIELD,
    MAGIC,
    NOTE,
    converting_into,
    damaged,
    metadata_record,
)
from lbsgd.errors import DataError


@dataclass(frozen=True)
class Identity:
    """One version of a file, as its file system describes it."""

    device: int
    inode: int
    num_bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> Identity:
        about = path.stat()
        return cls(about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)


@dataclass(frozen=True)
class Layout:
    """The content of header and field descriptors, with the places of the tables in bytes from the file's start."""

    path: Path
    identity: Identity
    num_images: int
    types: tuple[int, int]  # FFCV's type ids for the two fields
    names: tuple[str, str]
    metadata_at: int
    images_at: int  # the end of the metadata
    checksums_at: int | None  # None if FFCV's own writer made the file
    allocations_at: int

    @property
    def record(self) -> np.dtype:
        return metadata_record(list(self.types))

    @property
    def images_end(self) -> int:
        return self.allocations_at if self.checksums_at is None else self.checksums_at

    @property
    def table_bytes(self) -> int:
        return self.images_at + self.identity.num_bytes - self.images_end

    def column(self, type_id: int) -> str:
        """Return the name of a field's column in `record`."""
        return f"f{self.types.index(type_id)}"

    def name(self, type_id: int) -> str:
        return self.names[self.types.index(type_id)]


def read_layout(path: Path) -> Layout:
    """Read header and field descriptors. Raise DataError unless they fit the file's size and FFCV's format."""
    identity = Identity.of(path)
    header = _read_header(path, identity.num_bytes)
    fields = np.fromfile(path, FIELD, min(int(header["num_fields"]), 4), offset=HEADER.itemsize)
    types = fields["type_id"].tolist()
    _require_size(path, header, types, identity.num_bytes)
    if sorted(types) != [INT_FIELD, IMAGE_FIELD]:
        raise DataError(
            f"{path} does not hold images with labels: its fields have FFCV's types {types}, "
            f"not one RGBImageField ({IMAGE_FIELD}) and one IntField ({INT_FIELD})"
        )
    num_images, allocations_at = int(header["num_images"]), int(header["allocations_at"])
    metadata_at = HEADER.itemsize + fields.nbytes
    images_at = metadata_at + num_images * metadata_record(types).itemsize
    checksums_at = _checksums_at(path, fields, allocations_at, num_images)
    if images_at > (allocations_at if checksums_at is None else checksums_at):
        raise damaged(path, f"its header counts {num_images:,} images, more than it has room for")
    page_size = int(header["page_size"])
    if page_size == 0 or page_size & (page_size - 1):
        raise damaged(path, f"its header gives a page size of {page_size:,}, which is no power of two")
    names = _names(path, fields)
    places = (metadata_at, images_at, checksums_at, allocations_at)
    return Layout(path, identity, num_images, (types[0], types[1]), names, *places)


def _read_header(path: Path, num_bytes: int) -> np.void:
    if num_bytes == 0:
        raise DataError(f"{path} is empty; make it again with: {converting_into(path.parent)}")
    header = np.fromfile(path, HEADER, 1)
    if len(header) == 0 or header[0]["version"] != FORMAT_VERSION:
        raise DataError(f"{path} is not an FFCV file of format version {FORMAT_VERSION}")
    if header[0]["num_images"] == 0:
        raise DataError(f"{path} holds no images")
    return header[0]


def _require_size(path: Path, header: np.void, types: list[int], num_bytes: int) -> None:
    """Raise DataError unless the file has exactly the size that the header implies.

    The allocation table ends the file and has one record per image, so its last byte is the file's last byte. FFCV
    accepts a file that ends earlier, and trains without the missing images.
    """
    expected = int(header["allocations_at"]) + ALLOCATION.itemsize * int(header["num_images"])
    if header["allocations_at"] == 0 or num_bytes != expected:
        raise DataError(
            f"{path} is truncated or damaged: it has {num_bytes:,} bytes and should have {expected:,}"
            f"{_cut_off(path, int(header['num_images']), types, num_bytes)}; "
            f"copy it again, or make it again with: {converting_into(path.parent)}"
        )


def _cut_off(path: Path, num_images: int, types: list[int], num_bytes: int) -> str:
    """Name the first image that a truncated file lacks, if its images are in order, as our converter writes them."""
    if sorted(types) != [INT_FIELD, IMAGE_FIELD]:
        return ""
    record, at = metadata_record(types), HEADER.itemsize + len(types) * FIELD.itemsize
    if at + num_images * record.itemsize > num_bytes:
        return ""
    places = np.memmap(path, record, "r", at, (num_images,))[f"f{types.index(IMAGE_FIELD)}"]["data_at"]
    missing = np.flatnonzero(np.append(places[1:], places[-1:] + np.uint64(1)) > num_bytes)
    if len(missing) and (np.diff(places.astype(np.int64)) > 0).all():
        return f", and its images are cut off from image {missing[0]} on"
    return ""


def _checksums_at(path: Path, fields: np.ndarray, allocations_at: int, num_images: int) -> int | None:
    arguments = next(entry["arguments"] for entry in fields if entry["type_id"] == IMAGE_FIELD)
    note = np.frombuffer(bytes(arguments), NOTE, 1)[0]
    if note["magic"] != MAGIC:
        return None
    if int(note["checksums_at"]) + CHECKSUM.itemsize * num_images != allocations_at:
        raise damaged(path, "its checksums are not where its header says")
    return int(note["checksums_at"])


def _names(path: Path, fields: np.ndarray) -> tuple[str, str]:
    with contextlib.suppress(UnicodeDecodeError):
        first, second = (entry["name"].decode("ascii") for entry in fields)
        if first and second and first != second:
            return first, second
    shown = " and ".join(repr(bytes(entry["name"])) for entry in fields)
    raise damaged(path, f"its fields are called {shown}")
