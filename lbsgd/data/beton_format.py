"""The layout of an FFCV file of images and labels (format version 2), as NumPy types.

    header | field descriptors | metadata, a record per image | images | checksums | allocations, a record per image

The checksums are our addition: zlib's CRC-32 of each image's bytes as stored, uint32, in the order of the images. A
note says where they are. It lies in the image field's 1,024 bytes of arguments, which FFCV does not use, so FFCV sees
neither. Files of FFCV's own writer have no checksums.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import numpy as np

from lbsgd.errors import DataError

FORMAT_VERSION = 2
INT_FIELD, IMAGE_FIELD = 1, 2  # FFCV's type ids for IntField and RGBImageField

HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_images", "<u8"), ("allocations_at", "<u8")],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "S16"), ("arguments", "V1024")], align=True)
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_at", "<u8")])
LABEL = np.dtype("<i8")
ALLOCATION = np.dtype([("image", "<u8"), ("data_at", "<u8"), ("num_bytes", "<u8")])
NOTE = np.dtype([("magic", "S8"), ("checksums_at", "<u8")])  # at the start of the image field's arguments
MAGIC = b"lbsgd-1"
CHECKSUM = np.dtype("<u4")
JPEG, RAW = 0, 1  # modes of an image: the bytes of a JPEG, or its RGB pixels, row by row


def metadata_record(types: list[int]) -> np.dtype:
    """Return the metadata table's record. FFCV builds it by the same rule, so NumPy aligns the columns equally."""
    return np.dtype([("", IMAGE if type_id == IMAGE_FIELD else LABEL) for type_id in types], align=True)


def converting_into(folder: str | os.PathLike, source: str | os.PathLike = "IMAGENET") -> str:
    """Return the command that makes a data folder, as a shell takes it."""
    return shlex.join(["lbsgd", "convert", "--source", os.fspath(source), "--data_dir", os.fspath(folder)])


def damaged(path: Path, reason: str) -> DataError:
    """Return the error for a file with damaged tables."""
    return DataError(
        f"{path} is damaged: {reason}; copy it again, or make it again with: {converting_into(path.parent)}"
    )
