"""Survey all tables of an FFCV file: whether they agree with each other, and which images they describe.

The survey reads blocks of rows, so its memory does not grow with the file. Its result is kept for all processes of the
host and for later starts (`host_files.py`), under the version of the file. A file that was written a moment ago is
surveyed each time, because another change may leave its times the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass

import numpy as np

from lbsgd.data.beton_format import ALLOCATION, CHECKSUM, IMAGE_FIELD, INT_FIELD, JPEG, RAW, damaged
from lbsgd.data.beton_layout import Layout
from lbsgd.data.host_files import key_of, shared

ROWS = 1 << 16  # of a table, read at a time
SHARED_FROM = 4 << 20  # bytes of tables; smaller tables are read as fast as a result is looked up
SETTLED_SECONDS = 2.0  # the resolution of the coarsest file system clock
VERSION = 1  # of the kept result


@dataclass(frozen=True)
class Survey:
    """The result of surveying a file.

    fingerprint    identifies the images, not the file. It covers label, width, height, coding, size in bytes and
                   checksum (if the file has them) of every image. It leaves out the image's place in the file, because
                   with FFCV's own writer that depends on the order in which its processes happen to finish.
    tables         identifies the file: it covers every byte outside the images
    in_order       whether the allocation table lists the images in their order, as our converter writes it
    """

    fingerprint: str
    tables: str
    lowest_label: int
    highest_label: int
    in_order: bool


def survey(layout: Layout) -> Survey:
    """Return the survey of this version of a file, kept or new. Raise DataError for damaged tables."""
    if not _can_be_kept(layout):
        return _Pass(layout).survey()
    kept = shared("tables", _key(layout), lambda: json.dumps(asdict(_Pass(layout).survey())).encode())
    return Survey(**json.loads(kept.tobytes()))


def sizes_by_image(layout: Layout) -> np.ndarray:
    """Return the size of each image in bytes, uint64, for a file whose allocation table has another order."""

    def read() -> np.ndarray:
        table = _Pass(layout).sorted_allocations
        assert table is not None
        return np.ascontiguousarray(table["num_bytes"])

    return shared("sizes", _key(layout), read).view(np.uint64) if _can_be_kept(layout) else read()


def _key(layout: Layout) -> str:
    return key_of(VERSION, os.path.realpath(layout.path), astuple(layout.identity))


def _can_be_kept(layout: Layout) -> bool:
    changed = max(layout.identity.modified_ns, layout.identity.changed_ns) / 1e9
    return layout.table_bytes >= SHARED_FROM and time.time() - changed > SETTLED_SECONDS


class _Pass:
    """Reads the tables of one file, block by block."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.num_images = layout, layout.num_images
        self.in_order = all(
            np.array_equal(block["image"], np.arange(at, at + len(block), dtype=np.uint64))
            for at, block in self._allocations_as_written()
        )
        self.sorted_allocations = None if self.in_order else self._sorted_allocations()

    def survey(self) -> Survey:
        image, label = self.layout.column(IMAGE_FIELD), self.layout.column(INT_FIELD)
        digest, lowest, highest = hashlib.sha256(), np.iinfo(np.int64).max, np.iinfo(np.int64).min
        for (at, rows), (_, allocated) in zip(self._metadata(), self._allocations(), strict=True):
            self._check(at, rows[image], allocated)
            lowest, highest = min(lowest, int(rows[label].min())), max(highest, int(rows[label].max()))
            _cover(digest, rows[label])
        for column in ("width", "height", "mode"):
            for _, rows in self._metadata():
                _cover(digest, rows[image][column])
        for _, allocated in self._allocations():
            _cover(digest, allocated["num_bytes"])
        if self.layout.checksums_at is not None:
            for _, checksums in self._blocks(self.layout.checksums_at, CHECKSUM, self.num_images):
                _cover(digest, checksums)
        return Survey(digest.hexdigest(), self._digest_of_tables(), lowest, highest, self.in_order)

    def _check(self, at: int, images: np.ndarray, allocated: np.ndarray) -> None:
        """Raise DataError for the first of these images that contradicts its allocation or the format."""
        place, num_bytes = allocated["data_at"], allocated["num_bytes"]
        pixels = 3 * images["width"].astype(np.uint64) * images["height"]
        first, end = np.uint64(self.layout.images_at), np.uint64(self.layout.images_end)
        outside = (place < first) | (num_bytes > end - np.minimum(place, end))
        for wrong, reason in (
            (outside, "lies outside the part of the file that holds the images"),
            (images["data_at"] != place, "has two places, one in the metadata and one in the allocation table"),
            (num_bytes == 0, "has no bytes"),
            (pixels == 0, "has no pixels"),
            (images["mode"] > RAW, f"has a coding that is neither JPEG ({JPEG}) nor pixels ({RAW})"),
            ((images["mode"] == RAW) & (pixels != num_bytes), "does not have the bytes of its pixels"),
        ):
            if wrong.any():
                raise damaged(self.layout.path, f"image {at + int(wrong.argmax())} {reason}")

    def _digest_of_tables(self) -> str:
        digest = hashlib.sha256()
        for first, end in ((0, self.layout.images_at), (self.layout.images_end, self.layout.identity.num_bytes)):
            for _, content in self._blocks(first, np.dtype("u1"), end - first):
                _cover(digest, content)
        return digest.hexdigest()

    # --- blocks of rows, each with the number of its first row --------------------------------------------------------

    def _metadata(self) -> Iterator[tuple[int, np.ndarray]]:
        return self._blocks(self.layout.metadata_at, self.layout.record, self.num_images)

    def _allocations_as_written(self) -> Iterator[tuple[int, np.ndarray]]:
        return self._blocks(self.layout.allocations_at, ALLOCATION, self.num_images)

    def _allocations(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the allocations in the order of the images."""
        table = self.sorted_allocations
        if table is None:
            return self._allocations_as_written()
        return ((at, table[at : at + ROWS]) for at in range(0, self.num_images, ROWS))

    def _sorted_allocations(self) -> np.ndarray:
        """Return all allocations in the order of the images, for files of FFCV's writer only.

        They take 24 bytes per image. Sorting takes 56: two tables and the order.
        """
        table = np.concatenate([block for _, block in self._allocations_as_written()])
        table = table[np.argsort(table["image"])]
        if not np.array_equal(table["image"], np.arange(self.num_images, dtype=np.uint64)):
            reason = f"its allocation table does not give each of its {self.num_images:,} images a place in the file"
            raise damaged(self.layout.path, reason)
        return table

    def _blocks(self, at: int, dtype: np.dtype, num_rows: int) -> Iterator[tuple[int, np.ndarray]]:
        with open(self.layout.path, "rb", buffering=0) as file:
            file.seek(at)
            for first in range(0, num_rows, ROWS):
                rows = np.fromfile(file, dtype, min(ROWS, num_rows - first))
                if len(rows) < min(ROWS, num_rows - first):
                    raise damaged(self.layout.path, "it was made shorter while it was read")
                yield first, rows


def _cover(digest, column: np.ndarray) -> None:
    digest.update(np.ascontiguousarray(column).data)
