"""Read COCO's annotations once, check them, and keep them as shared bytes instead of millions of objects.

    DIR/train2017/*.jpg  DIR/val2017/*.jpg  DIR/annotations/instances_train2017.json, instances_val2017.json

Each split is a folder of images and a file of annotations with the same name.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lbsgd.data.coco_faults import fault_of
from lbsgd.data.coco_file import DOWNLOAD, by_image, listed_images, names_of, read_annotations
from lbsgd.errors import DataError

OnError = Literal["fail", "skip"]
LEAST_SIDE = 1e-3  # of a box, in pixels
# A box's least side as a share of the image's longer side. It is several steps of float32, so that the box has an area
# even if it is flipped and resized to any size. torchvision refuses boxes without an area.
LEAST_SHARE = 1e-6


@dataclass(frozen=True)
class Image:
    """One image of a split, and its annotations as COCO has them."""

    id: int
    path: Path
    height: int
    width: int
    annotations: list[dict[str, Any]]

    @property
    def is_tall(self) -> bool:
        """Whether the image is taller than wide; images of one orientation share a forward."""
        return self.height > self.width

    def objects(self) -> list[dict[str, Any]]:
        """Return the annotations to train on: without crowds, and without boxes that have no area inside the image."""
        return [each for each in self.alone() if self.box_of(each) is not None]

    def alone(self) -> list[dict[str, Any]]:
        """Return the annotations of single objects, without crowds."""
        return [each for each in self.annotations if not each.get("iscrowd")]

    def box_of(self, annotation: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
        """Return a box's left, top, right and bottom inside the image; None if it has no area there in float32."""
        x, y, width, height = map(float, annotation["bbox"])
        left, top = max(0.0, x), max(0.0, y)
        right, bottom = min(float(self.width), x + width), min(float(self.height), y + height)
        least = max(LEAST_SIDE, LEAST_SHARE * max(self.width, self.height))
        return (left, top, right, bottom) if min(right - left, bottom - top) > least else None


class Packed(Sequence[Image]):
    """Images in one buffer of bytes, which forked loaders share; Python objects would be copied by their ref counts."""

    def __init__(self, images: Sequence[Image]):
        pickled = [pickle.dumps(image, protocol=5) for image in images]
        self._ends = np.cumsum([0, *map(len, pickled)])
        self._bytes = np.frombuffer(b"".join(pickled), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: Any) -> Any:
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        image: Image = pickle.loads(self._bytes[self._ends[number] : self._ends[number + 1]].tobytes())
        return image


@dataclass(frozen=True, eq=False)
class CocoSplit:
    """The usable images of a split.

    names       of the categories, by their ids; the k-th category, counted from 1, is label k
    left_out    how many images, annotations or objects were left out, by reason
    """

    name: str
    images: Packed
    names: dict[int, str]
    is_tall: np.ndarray
    fingerprint: str
    left_out: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def label_of(self) -> dict[int, int]:
        return labels_of(self.names)

    @property
    def class_names(self) -> list[str]:
        return names_by_label(self.names)


def labels_of(ids: Iterable[int]) -> dict[int, int]:
    """Map COCO's category ids, which have gaps, to labels 1, 2, ... in their order; 0 is the background."""
    return {category: label for label, category in enumerate(sorted(ids), start=1)}


def names_by_label(names: Mapping[Any, str]) -> list[str]:
    """Return the names of the labels 1, 2, ... from names by category id."""
    return [names[category] for category in sorted(names)]


def read_split(
    folder: Path, name: str, on_error: OnError = "fail", training: bool = True, longer_side: float = math.inf
) -> CocoSplit:
    """Read DIR/annotations/instances_NAME.json and look for its images in DIR/NAME.

    training       leave out images without objects, and count them; evaluation keeps every image
    on_error       fail, or leave out and count: an image without a file, an image too thin, a broken annotation
    longer_side    the most pixels of an image's longer side in the network

    Raises DataError, which names the file and the image or annotation in it.
    """
    path = folder / "annotations" / f"instances_{name}.json"
    content, fingerprint = read_annotations(path)
    names = names_of(path, content["categories"])
    reader = _Reader(path, folder / name, on_error, names, longer_side)
    images = list(reader.images(content))
    if training:
        images = with_objects(images, reader.left_out)
    if on_error == "skip":  # the disk also decides which images are used
        fingerprint += " " + hashlib.sha256(repr([image.id for image in images]).encode()).hexdigest()
    if not images:
        raise DataError(f"{path}: no image of it can be used: {left_out_words(reader.left_out) or 'it lists none'}")
    tall = np.array([image.is_tall for image in images])
    return CocoSplit(name, Packed(images), names, tall, fingerprint, +reader.left_out)


def with_objects(images: Iterable[Image], left_out: Counter[str]) -> list[Image]:
    """Return the images that have objects to train on, and count everything else."""
    kept = []
    for image in images:
        objects = len(image.objects())
        left_out["boxes without an area"] += len(image.alone()) - objects
        left_out["images without objects"] += not objects
        if objects:
            kept.append(image)
    return kept


def without_images(split: CocoSplit) -> CocoSplit:
    """Return a split with the same categories and no images, to stand in for one that is not read."""
    return CocoSplit("", Packed([]), split.names, split.is_tall[:0], "")


def left_out_words(left_out: Counter[str]) -> str:
    """Say how much was left out of a split, and why."""
    return "; ".join(f"{number:,} {what} left out" for what, number in (+left_out).items())


class _Reader:
    """Turns a file's lists into images; an unusable entry is an error, or is counted and left out."""

    def __init__(self, path: Path, folder: Path, on_error: OnError, names: Mapping[int, str], longer_side: float):
        self.path, self.folder, self.on_error, self.names = path, folder, on_error, names
        self.longer_side = longer_side
        self.left_out: Counter[str] = Counter()
        try:
            with os.scandir(folder) as entries:  # knows which entries are files without asking the disk again
                self.files = {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
        except OSError as error:
            raise DataError(f"{folder} cannot be read ({error.strerror}); {DOWNLOAD}") from None

    def images(self, content: Mapping[str, Any]) -> Iterator[Image]:
        """Yield the images in the order of their ids."""
        annotations = by_image(self.path, content["annotations"])
        listed = listed_images(self.path, content["images"])
        self.require_images_of(annotations, {image.id for image in listed})
        for number, file_name, height, width in listed:
            path = self.folder / file_name
            if file_name not in self.files and not os.path.isfile(path):  # a name may contain folders, or be a link
                self.leave_out(f"image {number}: {path} does not exist", "images without a file")
                continue
            if max(height, width) >= self.longer_side * min(height, width):  # torchvision would leave it no pixels
                said = f"image {number} ({file_name}) has {width}x{height} pixels, and none when it is resized to"
                self.leave_out(f"{said} lbsgd.detection.longer_side, {self.longer_side}", "images too thin")
                continue
            image = Image(number, path, height, width, [])
            image.annotations.extend(each for each in annotations.get(number, ()) if self.is_sound(each, image))
            yield image

    def require_images_of(self, annotations: Mapping[Any, list[dict[str, Any]]], numbers: set[Any]) -> None:
        for number, of_image in annotations.items():
            if number not in numbers:
                said = f"annotation {of_image[0].get('id')} belongs to image {number!r}, which is not listed"
                self.leave_out(said, "annotations of unknown images", len(of_image))

    def is_sound(self, annotation: dict[str, Any], image: Image) -> bool:
        """Whether an annotation can be used; its fault goes to `leave_out`."""
        if self.on_error == "skip":
            self.leave_out_points(annotation)
        wrong = fault_of(annotation, image.height, image.width, self.names)
        if wrong:
            said = f"annotation {annotation.get('id')} of image {image.id} ({image.path.name}): {wrong}"
            self.leave_out(said, "broken annotations")
        return not wrong

    def leave_out_points(self, annotation: dict[str, Any]) -> None:
        """Leave out polygons of fewer than three points, if the object has others."""
        outline = annotation.get("segmentation")
        if isinstance(outline, list):
            with_area = [polygon for polygon in outline if not isinstance(polygon, list) or len(polygon) >= 6]
            if with_area:
                annotation["segmentation"] = with_area
                self.left_out["polygons of fewer than 3 points"] += len(outline) - len(with_area)

    def leave_out(self, said: str, what: str, number: int = 1) -> None:
        if self.on_error != "skip":
            raise DataError(f"{self.path}: {said}; mend it, or leave such out with --on_error skip")
        self.left_out[what] += number


def require_same_categories(train: CocoSplit, val: CocoSplit) -> None:
    """Raise DataError with the first category in which two splits differ."""
    for category in sorted({*train.names, *val.names}, key=lambda each: (isinstance(each, str), each)):
        first, second = train.names.get(category, "not there"), val.names.get(category, "not there")
        if first != second:
            raise DataError(
                f"category {category!r} is {first} in instances_{train.name}.json and {second} in "
                f"instances_{val.name}.json: the two files are of different data sets"
            )
