"""Order a source's images class by class and by name, and label them by their folders or by a table."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lbsgd.convert.files import Files, sorted_rows
from lbsgd.convert.left_out import MISSING_IMAGE, STRAY_FILE, SUFFIXES, LeftOut, path_reason
from lbsgd.convert.source_images import Images
from lbsgd.errors import DataError
from lbsgd.units import shortened

# (name, number of the shard) -> the key that sorts the images of a class.
Key = Callable[[str, int], Any]


def by_path(name: str, _shard: int) -> tuple[str, str]:
    return os.path.split(name)


class ByClass:
    """The rows of one split's files, each with its class, and what the split leaves out.

    files: of one split or of several. container: the folder or file that holds them. origin: its name for people.
    place: where the split lies in it, for messages. stamp: an archive's, which counts for all its members.
    """

    def __init__(
        self, files: Files, container: Path, origin: str, *, place: str | None = None, stamp: int | None = None
    ) -> None:
        self.files, self.container, self.origin = files, container, origin
        self.place, self.stamp = place or origin, stamp
        self.rows, self.numbers_of_rows = array("I"), array("I")
        self.numbers: dict[str, int] = {}  # of the classes, in the order found
        self.loose = array("I")  # rows of images outside any class folder
        self.left_out = LeftOut()

    def add(self, row: int, class_name: str) -> None:
        self.rows.append(row)
        self.numbers_of_rows.append(self.numbers.setdefault(class_name, len(self.numbers)))

    def add_by_folder(self, row: int, path: str) -> None:
        """Add an image to the class that its first folder names, or to the loose ones. Leave out other files."""
        if reason := path_reason(path):
            self.left_out.add(*reason)
        elif "/" in path:
            self.add(row, path.split("/", 1)[0])
        else:
            self.loose.append(row)

    def label_loose(self, labels: Mapping[str, str], classes: list[str]) -> None:
        """Add the loose images to their classes. labels: classes by the images' names without suffix.

        Missing images, which only the table lists, are counted, because a copy may have been interrupted.
        Raises DataError for an image whose class is unknown or has no training images.
        """
        known, missing = set(classes), set(labels)
        self.numbers = {}  # drop the classes of folders without images
        for row in self.loose:
            name = self.files.names[row]
            stem = Path(name).stem
            label = labels.get(stem)
            missing.discard(stem)
            if label is None or label not in known:
                wrong = (
                    f"has class {label}, which has no training images"
                    if label
                    else "has no label in the devkit or in LOC_val_solution.csv"
                )
                raise DataError(f"{self.origin}: {name} {wrong}; use archives of one data set")
            self.add(row, label)
        self.loose = array("I")
        for name in missing:
            self.left_out.add(MISSING_IMAGE, name)

    def images(self, key: Key = by_path, classes: list[str] | None = None, *, may_repeat: bool = False) -> Images:
        """Return all images that were added.

        classes: all classes in order, with or without images; by default those found, sorted by name.
        may_repeat: whether images may share a key. They then come in the order found.
        Raises DataError if there are no images, if a class folder has none, or if keys repeat that may not.
        """
        for row in self.loose:
            self.left_out.add(STRAY_FILE, self.files.names[row])
        classes = sorted(self.numbers) if classes is None else classes
        order, counts = self._order(classes, key, may_repeat)
        return Images(
            self.container,
            classes=classes,
            files=self.files,
            rows=order,
            labels=np.repeat(np.arange(len(classes), dtype=np.uint32), counts),
            sizes=self.files.taken("sizes", order),
            origin=self.origin,
            stamp=self.stamp,
            left_out=self.left_out,
        )

    def _order(self, classes: list[str], key: Key, may_repeat: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows in the order of the images, and the number of images of each class."""
        positions = {name: position for position, name in enumerate(classes)}
        position_of = np.array([positions[name] for name in self.numbers], np.uint32)
        labels = position_of[np.asarray(self.numbers_of_rows)]
        counts = np.bincount(labels, minlength=len(classes))
        self._refuse_empty([name for name in sorted(self.numbers) if not counts[positions[name]]], len(labels))
        by_class = np.argsort(labels, kind="stable").astype(np.uint32)
        rows = np.asarray(self.rows)[by_class]
        del by_class, labels
        start = 0
        for count in counts.tolist():
            in_order = self._sorted(rows[start : start + count], key, may_repeat)
            rows[start : start + count] = np.fromiter(in_order, np.uint32, count)
            start += count
        return rows, counts

    def _sorted(self, rows: np.ndarray, key: Key, may_repeat: bool) -> Iterator[int]:
        before = None
        names, shards = self.files.names, self.files.column("shards")
        for value, row in sorted_rows(rows, lambda row: key(names[row], int(shards[row]))):
            if value == before and not may_repeat:
                raise DataError(
                    f"{self.origin}: member {names[row]!r} is there twice, and only one can be meant; use another "
                    f"archive, or unpack it yourself and name the folder with --source"
                )
            yield row
            before = value

    def _refuse_empty(self, empty: list[str], num_images: int) -> None:
        if empty or not num_images:
            raise DataError(
                f"no images in {self.place}{' for class ' if empty else ''}{shortened(empty)}; expected one "
                f"folder per class, with images ({' '.join(SUFFIXES)}) in each"
            )
