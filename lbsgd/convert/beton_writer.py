"""Write a .beton file from beginning to end, and resume after an interruption.

Images come in order, so a restart only needs to know how many are on the disk. A journal next to the file records this
in blocks of records; each block is written after its images have been forced to the disk. On restart the file is cut to
the end of the last image in the journal. The result depends on the images alone. It is the same file, byte for byte,
whether interrupted or not and with any number of processes.

    header | field descriptors | room for metadata | images | checksums | allocations
    written by finish()                            | append() | finish()
"""

from __future__ import annotations

import errno
import os
import weakref
import zlib
from pathlib import Path

import numpy as np

from lbsgd.convert.image import MODES, SCALED, UNDECODABLE
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
    metadata_record,
)
from lbsgd.disk import to_disk
from lbsgd.errors import DataError

SIZES = [("width", "<u2"), ("height", "<u2"), ("num_bytes", "<u4")]
RECORD = np.dtype([("kind", "<u1"), *SIZES, ("checksum", "<u4"), ("data_at", "<u8")])  # of one image
BLOCK = np.dtype([("magic", "S4"), ("num_records", "<u4"), ("checksum", "<u4")])  # precedes each block of records
TYPES = [IMAGE_FIELD, INT_FIELD]
METADATA = metadata_record(TYPES)
METADATA_AT = HEADER.itemsize + len(TYPES) * FIELD.itemsize
TABLE_ROWS = 1 << 13  # made at a time, because a table of all images takes as much memory as the records
MIN_PAGE, MAX_PAGE = 1 << 23, 1 << 28  # FFCV's own default, and the most that FFCV should read at once


class BetonWriter:
    """The file at `path` and the journal next to it, with room for the metadata of num_images."""

    def __init__(self, path: Path, num_images: int, page_size: int) -> None:
        self.path, self.page_size = path, page_size
        self.records = np.zeros(num_images, RECORD)
        self.done = 0  # images so far, including those that cannot be decoded
        self.end = METADATA_AT + num_images * METADATA.itemsize
        self._journal = os.open(path.with_suffix(".journal"), os.O_RDWR | os.O_CREAT, 0o666)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self.close = weakref.finalize(self, _close, self._file, self._journal)  # even if the conversion fails
        self._resume()
        self._committed = self.done

    def _resume(self) -> None:
        """Continue after the images that the journal lists, and drop the bytes after them."""
        content = os.pread(self._journal, os.fstat(self._journal).st_size, 0)
        records, num_bytes = read_journal(content)
        stored = records[records["kind"] != UNDECODABLE]
        end = int(stored["data_at"][-1]) + int(stored["num_bytes"][-1]) if len(stored) else self.end
        if len(records) > len(self.records) or os.fstat(self._file).st_size < end and len(stored):
            records, num_bytes, end = records[:0], 0, self.end  # the journal is another file's
        self.records[: len(records)] = records
        self.done, self.end = len(records), end
        os.ftruncate(self._journal, num_bytes)
        os.lseek(self._journal, num_bytes, os.SEEK_SET)
        os.ftruncate(self._file, self.end)

    def append(self, records: np.ndarray, data: memoryview) -> None:
        """Write images one after the other.

        records: one RECORD per image, in which this method sets data_at. data: the bytes of all images.
        """
        start, position, run_at = 0, 0, self.end
        for record in records:
            num_bytes = int(record["num_bytes"])
            if record["kind"] == UNDECODABLE:
                continue
            if self.end % self.page_size + num_bytes > self.page_size:  # FFCV reads pages: no image may lie in two
                self._write(data[start:position], run_at)
                self.end += -self.end % self.page_size
                start, run_at = position, self.end
            record["data_at"] = self.end
            self.end += num_bytes
            position += num_bytes
        self._write(data[start:position], run_at)
        self.records[self.done : self.done + len(records)] = records
        self.done += len(records)

    def _write(self, data: memoryview, at: int) -> None:
        while data:  # a nearly full disk writes a part, and raises at the next call
            written = os.pwrite(self._file, data, at)
            data, at = data[written:], at + written

    def failed(self, images: slice = slice(None)) -> int:
        """Return how many of these images, by default all so far, cannot be decoded."""
        return int(np.count_nonzero(self.records["kind"][: self.done][images] == UNDECODABLE))

    def image_bytes(self) -> int:
        """Return the bytes of all images so far, with the unused ends of pages."""
        return self.end - METADATA_AT - len(self.records) * METADATA.itemsize

    def commit(self, done: int) -> None:
        """Force the first `done` images to the disk, then record them in the journal. May run in another thread."""
        if done == self._committed:
            return
        os.fdatasync(self._file)
        block = journal_block(self.records[self._committed : done])
        if os.write(self._journal, block) < len(block):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a full disk writes a part
        os.fdatasync(self._journal)
        self._committed = done

    def finish(self, labels: np.ndarray) -> None:
        """Write the tables around the images. An image that cannot be decoded gets no number.

        labels: of all images. Raises DataError if no image can be decoded.
        """
        assert self.done == len(self.records) == len(labels)
        num_images = int(np.count_nonzero(self.records["kind"] != UNDECODABLE))
        if num_images == 0:
            raise DataError(f"{self.path.stem}: none of the {len(self.records):,} images can be decoded")
        tables_at = self.end + num_images * CHECKSUM.itemsize
        os.ftruncate(self._file, self.end)
        first = 0  # number of the block's first image
        for at in range(0, len(self.records), TABLE_ROWS):
            block = slice(at, at + TABLE_ROWS)
            kept = self.records[block]["kind"] != UNDECODABLE
            stored = self.records[block][kept]
            self._write_table(stored["checksum"].astype(CHECKSUM), self.end, first)
            self._write_table(_allocations(stored, first), tables_at, first)
            self._write_table(_metadata(stored, labels[block][kept]), METADATA_AT, first)
            first += len(stored)
        self._write(memoryview(self._header(num_images, tables_at)), 0)
        self.close()
        to_disk(self.path)

    def _write_table(self, rows: np.ndarray, table_at: int, first: int) -> None:
        """Write rows of a table, starting at row `first`."""
        self._write(memoryview(rows.tobytes()), table_at + first * rows.itemsize)

    def _header(self, num_images: int, allocations_at: int) -> bytes:
        note = np.array((MAGIC, self.end), NOTE).tobytes()
        fields = np.zeros(len(TYPES), FIELD)
        fields["type_id"], fields["name"] = TYPES, ("image", "label")
        fields["arguments"][0] = np.frombuffer(note.ljust(FIELD["arguments"].itemsize, b"\0"), FIELD["arguments"])[0]
        header = np.array((FORMAT_VERSION, len(TYPES), self.page_size, num_images, allocations_at), HEADER)
        return header.tobytes() + fields.tobytes()


def _close(*files: int) -> None:
    for file in files:
        os.close(file)


def _allocations(stored: np.ndarray, first: int) -> np.ndarray:
    table = np.zeros(len(stored), ALLOCATION)
    table["image"] = np.arange(first, first + len(stored))
    table["data_at"], table["num_bytes"] = stored["data_at"], stored["num_bytes"]
    return table


def _metadata(stored: np.ndarray, labels: np.ndarray) -> np.ndarray:
    table = np.zeros(len(stored), METADATA)
    for name in ("width", "height", "data_at"):
        table["f0"][name] = stored[name]
    for kind, mode in MODES.items():
        table["f0"]["mode"][stored["kind"] & ~np.uint8(SCALED) == kind] = mode
    table["f1"] = labels
    return table


def page_size(side: int, largest_source: int, raw: bool) -> int:
    """Return a power of two that holds any image: side x side pixels, or less if the source files are small.

    JPEGs are assumed to become at most four times as large as the largest source file.
    """
    needed = 3 * side * side if raw else min(3 * side * side, 4 * largest_source)
    return min(MAX_PAGE, max(MIN_PAGE, 1 << (needed - 1).bit_length()))


# --- the journal ------------------------------------------------------------------------------------------------------


def journal_block(records: np.ndarray) -> bytes:
    content = records.tobytes()
    return np.array((b"lbsg", len(records), zlib.crc32(content)), BLOCK).tobytes() + content


def read_journal(content: bytes) -> tuple[np.ndarray, int]:
    """Return the records of all whole blocks, and the blocks' bytes. A block cut by a power failure does not count."""
    at, blocks = 0, [np.zeros(0, RECORD)]
    while at + BLOCK.itemsize <= len(content):
        [block] = np.frombuffer(content, BLOCK, 1, at)
        records = content[at + BLOCK.itemsize : at + BLOCK.itemsize + int(block["num_records"]) * RECORD.itemsize]
        if block["magic"] != b"lbsg" or zlib.crc32(records) != block["checksum"] or not records:
            break
        blocks.append(np.frombuffer(records, RECORD))
        at += BLOCK.itemsize + len(records)
    return np.concatenate(blocks), at
