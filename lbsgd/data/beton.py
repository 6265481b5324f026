"""Verify and map an FFCV file of images and labels without FFCV.

`import ffcv` takes seconds. A plan, a check or a refusal needs only a few facts, so this module reads them with NumPy.
The tables are mapped, so that all processes of a host share one copy of them.
"""

from __future__ import annotations

import errno
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lbsgd.data.beton_format import (
    ALLOCATION,
    CHECKSUM,
    IMAGE_FIELD,
    INT_FIELD,
    damaged,
)
from lbsgd.data.beton_layout import Identity, Layout, read_layout
from lbsgd.data.beton_survey import Survey, sizes_by_image, survey
from lbsgd.data.mapped import mapped
from lbsgd.errors import DataError

PUT_BACK = "put the old one back (lbsgd convert --verify checks it); a training run goes on with --resume"


@dataclass(frozen=True, eq=False)
class BetonFile:
    """Everything about an FFCV file of labelled images that needs no decoding.

    content, labels, images, sizes and checksums are read-only views of the mapped file. An index or a slice reads only
    the selected rows; an operation on a whole column reads all of it.
    """

    path: Path
    num_images: int
    content: np.ndarray  # uint8: the file
    labels: np.ndarray  # int64, (num_images,)
    images: np.ndarray  # IMAGE, (num_images,): mode, width, height, place
    sizes: np.ndarray  # uint64, (num_images,): bytes of each image
    checksums: np.ndarray | None  # uint32, (num_images,); None if FFCV's own writer made the file
    image_field: str
    survey: Survey
    identity: Identity

    @property
    def fingerprint(self) -> str:
        return self.survey.fingerprint

    def is_as_converted(self, image: int) -> bool:
        """Return whether an image's bytes are those that the converter wrote; False without checksums.

        The converter copies JPEGs, so a JPEG that decodes with warnings may have been damaged in the source.
        """
        place = int(self.images[image]["data_at"])
        data = self.content[place : place + int(self.sizes[image])]
        return self.checksums is not None and zlib.crc32(data.data) == self.checksums[image]

    def require_unchanged(self) -> None:
        """Raise DataError if the file has been replaced, or its content changed, since it was opened.

        A file that was overwritten byte for byte, or only touched, counts as the same.
        """
        try:
            if Identity.of(self.path) == self.identity or BetonFile.open(self.path).survey == self.survey:
                return
        except (OSError, DataError) as error:
            reason = f"{self.path} has changed while this run reads it ({error})"
        else:
            reason = f"{self.path} has been replaced by another file while this run reads it"
        raise DataError(f"{reason}; {PUT_BACK}")

    @classmethod
    def open(cls, path: str | os.PathLike) -> BetonFile:
        """Map and verify an FFCV file. Raise DataError unless it is complete and holds images and labels."""
        path = Path(path)
        try:
            layout = read_layout(path)
            return _mapped(layout, survey(layout))
        except OSError as error:
            way_out = "; its file system maps no files, so copy it to another" if error.errno == errno.ENODEV else ""
            raise DataError(f"cannot read {path}: {error.strerror}{way_out}") from error


def _mapped(layout: Layout, found: Survey) -> BetonFile:
    content = mapped(layout.path, PUT_BACK)
    if len(content) != layout.identity.num_bytes:
        raise damaged(layout.path, "it is being written")

    def column(at: int, dtype: np.dtype) -> np.ndarray:
        return content[at : at + layout.num_images * dtype.itemsize].view(dtype)

    metadata = column(layout.metadata_at, layout.record)
    return BetonFile(
        layout.path,
        layout.num_images,
        content,
        metadata[layout.column(INT_FIELD)],
        metadata[layout.column(IMAGE_FIELD)],
        column(layout.allocations_at, ALLOCATION)["num_bytes"] if found.in_order else sizes_by_image(layout),
        None if layout.checksums_at is None else column(layout.checksums_at, CHECKSUM),
        image_field=layout.name(IMAGE_FIELD),
        survey=found,
        identity=layout.identity,
    )
