"""Read the labels of ImageNet's validation images from their annotations, if there is no table of labels.

Kaggle's archive has Annotations/CLS-LOC/val/NAME.xml beside Data/CLS-LOC: the boxes of an image's objects, each with a
WordNet id as its name, the image's class.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from lbsgd.convert.files import Files
from lbsgd.errors import DataError

ANNOTATIONS = "Annotations/CLS-LOC/val"
MAX_BYTES = 1 << 20  # 1 MiB, a thousand times the size of an annotation
CLASS_NAME = re.compile(rb"<object>.*?<name>\s*([^<\s]+)\s*</name>", re.DOTALL)


def labels_in_folder(folder: Path) -> dict[str, str]:
    """Return the classes of the validation images by their names without suffix; empty if there is no folder.

    Raises DataError for an annotation that names no class, or several.
    """
    files = (path for path in sorted(folder.glob("*.xml")) if not path.name.startswith("."))
    return _labels((str(path), _beginning(path)) for path in files)


def labels_in_tar(members: Files, tar: Path, origin: Path) -> dict[str, str]:
    """Return the same from a tar's members. origin: the archive whose content the tar is, for messages."""
    with open(tar, "rb") as file:
        return _labels(
            (f"{origin}: {member.name}", os.pread(file.fileno(), min(member.num_bytes, MAX_BYTES), member.offset))
            for member in map(members.member, _rows(members))
        )


def _rows(members: Files) -> Iterator[int]:
    """Yield the rows of the annotations, a few among a million names."""
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
