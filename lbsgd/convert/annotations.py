"""Read the labels of ImageNet's validation images from their annotations, if there is no table of labels.

Kaggle's archive has Annotations/CLS-LOC/val/NAME.xml next to Data/CLS-LOC. Each file lists the boxes of an image's
objects. The name of each object is a WordNet id, which is the image's class.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from lbsgd.convert.files import Files
from lbsgd.errors import DataError

ANNOTATIONS = "Annotations/CLS-LOC/val"
MAX_BYTES = 1 << 20  # 1 MiB; an annotation is a thousand times smaller
CLASS_NAME = re.compile(rb"<object>.*?<name>\s*([^<\s]+)\s*</name>", re.DOTALL)


def labels_in_folder(folder: Path) -> dict[str, str]:
    """Return {name of a validation image without its suffix: its class}, empty if there is no folder.

    Raises DataError for an annotation that names no class or several classes.
    """
    files = (path for path in sorted(folder.glob("*.xml")) if not path.name.startswith("."))
    return _labels((str(path), _beginning(path)) for path in files)


def labels_in_tar(members: Files, tar: Path, origin: Path) -> dict[str, str]:
    """Return the same from a tar's members. origin: the archive that messages name, which may be compressed."""
    with open(tar, "rb") as file:
        return _labels(
            (f"{origin}: {member.name}", os.pread(file.fileno(), min(member.num_bytes, MAX_BYTES), member.offset))
            for member in map(members.member, _rows(members))
        )


def _rows(members: Files) -> Iterator[int]:
    """Yield the rows of the annotations among the members, which may be a million."""
    for row, name in enumerate(members.names):
        folder, _, file = name.rpartition("/")
        if file.endswith(".xml") and not file.startswith(".") and folder.endswith(ANNOTATIONS):
            yield row


def _beginning(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(MAX_BYTES)


def _labels(annotations: Iterator[tuple[str, bytes]]) -> dict[str, str]:
    labels = {}
    for place, text in annotations:
        classes = set(CLASS_NAME.findall(text))
        if len(classes) != 1:
            raise DataError(
                f"{place} names {len(classes)} classes, and a validation image has one; fetch the archive again, or "
                f"put LOC_val_solution.csv beside the images"
            )
        labels[PurePosixPath(place).stem] = classes.pop().decode(errors="replace")
    return labels
