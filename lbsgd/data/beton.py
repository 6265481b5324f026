"""The format of one FFCV file of images and labels, read and verified without FFCV.

`import ffcv` takes four seconds. A plan, a check or a refusal needs only a few facts, so this module reads them with
NumPy: the header of an FFCV file (format version 2), the sizes and labels in its metadata table, and its allocation
table.

    header | field descriptors | metadata, a record per image | images | checksums | allocations, a record per image

The checksums are an addition of ours: the CRC-32 (zlib's) of each image's bytes as stored, uint32, in the order of the
images. A note says where they are. It lies in the image field's 1,024 bytes of arguments, which FFCV does not use, so
FFCV sees neither. Files of FFCV's own writer have no checksums. The manifest's fingerprint covers them, so the manifest
and one pass over the images prove every bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lbsgd.errors import DataError

FORMAT_VERSION = 2
INT_FIELD, IMAGE_FIELD = 1, 2  # FFCV's type ids of IntField and RGBImageField

HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_images", "<u8"), ("allocations_at", "<u8")],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "S16"), ("arguments", "V1024")], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_at", "<u8")])
LABEL = np.dtype("<i8")
ALLOCATION = np.dtype([("image", "<u8"), ("data_at", "<u8"), ("num_bytes", "<u8")])
NOTE = np.dtype([("magic", "S8"), ("checksums_at", "<u8")])  # the image field's arguments begin with it
MAGIC = b"lbsgd-1"
CHECKSUM = np.dtype("<u4")
JPEG, RAW = 0, 1  # modes of an image: the bytes of a JPEG, or its RGB pixels, row by row

CONVERT = "python tools/convert_imagenet_to_ffcv.py --source IMAGENET --data_dir {}"


@dataclass(frozen=True, eq=False)
class BetonFile:
    """All that an FFCV file of labelled images tells without decoding one.

    fingerprint identifies the images and not the file. It covers the label, width, height, coding, size in bytes and
    checksum (if the file has them) of every image. It leaves out the image's place in the file, because FFCV's own
    writer chooses it by the order in which its processes happen to finish.
    """

    path: Path
    num_images: int
    labels: np.ndarray  # int64, (num_images,), read-only
    images: np.ndarray  # IMAGE, (num_images,): mode, width, height, place
    sizes: np.ndarray  # uint64, (num_images,): bytes of each image
    checksums: np.ndarray | None  # uint32, (num_images,); None if FFCV's own writer made the file
    image_field: str
    label_field: str
    fingerprint: str

    def is_as_converted(self, image: int) -> bool:
        """Return whether the bytes of an image are those that the converter wrote; False without checksums.

        The converter copies JPEGs, so one that decodes with warnings may have been damaged in the source already.
        """
        with open(self.path, "rb") as file:
            file.seek(int(self.images[image]["data_at"]))
            data = file.read(int(self.sizes[image]))
        return self.checksums is not None and zlib.crc32(data) == self.checksums[image]

    @classmethod
    def open(cls, path: str | os.PathLike) -> BetonFile:
        """Read and verify an FFCV file. Raise DataError unless it is complete and holds images and labels."""
        path = Path(path)
        try:
            return _open(path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error


def _open(path: Path) -> BetonFile:
    header = _read_header(path)
    fields = np.fromfile(path, FIELD, header["num_fields"], offset=HEADER.itemsize)
    images, labels = _read_metadata(path, fields, int(header["num_images"]))
    sizes = _read_sizes(path, int(header["allocations_at"]), len(images))
    checksums = _read_checksums(path, fields, int(header["allocations_at"]), len(images))
    labels = np.ascontiguousarray(labels)
    labels.setflags(write=False)
    names = {entry["type_id"]: entry["name"].decode() for entry in fields}
    covered = [labels, images["width"], images["height"], images["mode"], sizes]
    fingerprint = _fingerprint(*covered, *([] if checksums is None else [checksums]))
    images = np.ascontiguousarray(images)
    fields_found = dict(image_field=names[IMAGE_FIELD], label_field=names[INT_FIELD])
    return BetonFile(path, len(images), labels, images, sizes, checksums, **fields_found, fingerprint=fingerprint)


def _read_header(path: Path) -> np.void:
    """Read the header, and refuse the file unless it has exactly the size that the header implies."""
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        raise DataError(f"{path} is empty; make it again with: {CONVERT.format(path.parent)}")
    header = np.fromfile(path, HEADER, 1)
    if len(header) == 0 or header[0]["version"] != FORMAT_VERSION:
        raise DataError(f"{path} is not an FFCV file of format version {FORMAT_VERSION}")
    header = header[0]
    if header["num_images"] == 0:
        raise DataError(f"{path} holds no images")
    # The allocation table ends the file and has one record per image, so its last byte is the file's last byte.
    # FFCV accepts a file that ends earlier, and trains without the missing images.
    expected = int(header["allocations_at"]) + ALLOCATION.itemsize * int(header["num_images"])
    if header["allocations_at"] == 0 or num_bytes != expected:
        cut_off = _cut_off(path, header, num_bytes)
        raise DataError(
            f"{path} is truncated or damaged: it has {num_bytes:,} bytes and should have {expected:,}{cut_off}; "
            f"copy it again, or make it again with: {CONVERT.format(path.parent)}"
        )
    return header


def _cut_off(path: Path, header: np.void, num_bytes: int) -> str:
    """Name the first image that a truncated file lacks, if its images lie in order, as our converter writes them."""
    fields = np.fromfile(path, FIELD, min(header["num_fields"], 2), offset=HEADER.itemsize)
    with contextlib.suppress(DataError):
        images, _ = _read_metadata(path, fields, int(header["num_images"]))
        missing = np.flatnonzero(np.append(images["data_at"][1:], images["data_at"][-1:] + np.uint64(1)) > num_bytes)
        if len(missing) and (np.diff(images["data_at"].astype(np.int64)) > 0).all():
            return f", and its images are cut off from image {missing[0]} on"
    return ""


def metadata_record(types: list[int]) -> np.dtype:
    """Return the record of the metadata table. FFCV builds it by the same rule, so NumPy aligns the columns equally."""
    return np.dtype([("", IMAGE if type_id == IMAGE_FIELD else LABEL) for type_id in types], align=True)


def _read_metadata(path: Path, fields: np.ndarray, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the columns of images and of labels; either may come first in the file."""
    types = fields["type_id"].tolist()
    if sorted(types) != [INT_FIELD, IMAGE_FIELD]:
        raise DataError(
            f"{path} does not hold images with labels: its fields have FFCV's types {types[:4]}, "
            f"not one RGBImageField ({IMAGE_FIELD}) and one IntField ({INT_FIELD})"
        )
    table = np.fromfile(path, metadata_record(types), num_images, offset=HEADER.itemsize + fields.nbytes)
    return table[f"f{types.index(IMAGE_FIELD)}"], table[f"f{types.index(INT_FIELD)}"]


def _read_sizes(path: Path, allocations_at: int, num_images: int) -> np.ndarray:
    """Return the bytes of each image. The allocation table lists the images in the order of writing."""
    table = np.fromfile(path, ALLOCATION, offset=allocations_at)
    table = table[np.argsort(table["image"])]
    lists_each_image_once = np.array_equal(table["image"], np.arange(num_images))
    if not lists_each_image_once or (table["data_at"] + table["num_bytes"] > allocations_at).any():
        raise DataError(
            f"{path} is damaged: its allocation table does not give each of its {num_images:,} images a "
            f"place in the file; make it again with: {CONVERT.format(path.parent)}"
        )
    return table["num_bytes"]


def _read_checksums(path: Path, fields: np.ndarray, allocations_at: int, num_images: int) -> np.ndarray | None:
    arguments = next(entry["arguments"] for entry in fields if entry["type_id"] == IMAGE_FIELD)
    note = np.frombuffer(bytes(arguments), NOTE, 1)[0]
    if note["magic"] != MAGIC:
        return None
    if int(note["checksums_at"]) + CHECKSUM.itemsize * num_images != allocations_at:
        raise DataError(
            f"{path} is damaged: its checksums are not where its header says; copy it again, or make it "
            f"again with: {CONVERT.format(path.parent)}"
        )
    return np.fromfile(path, CHECKSUM, num_images, offset=int(note["checksums_at"]))


def _fingerprint(*columns: np.ndarray) -> str:
    digest = hashlib.sha256()
    for column in columns:
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()
