"""Read COCO's file of annotations, and check its JSON and its lists before anything relies on them."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lbsgd.data.coco_faults import is_finite, repeated
from lbsgd.errors import DataError

DOWNLOAD = "docs/detection.md says how to download COCO"
LONGEST_SIDE = 10**6  # pixels; a longer side is a mistake


class ListedImage(NamedTuple):
    """An image as the file lists it."""

    id: Any
    file_name: str
    height: int
    width: int


def read_annotations(path: Path) -> tuple[dict[str, Any], str]:
    """Return a file's content and its digest. Raises DataError if it is not in COCO's format."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {DOWNLOAD}") from None
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); {DOWNLOAD}") from None
    lists = ("images", "annotations", "categories")
    missing = [key for key in lists if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if missing:
        raise DataError(f"{path} has no list of {', '.join(missing)}: not a file of COCO's instances; {DOWNLOAD}")
    return content, hashlib.sha256(data).hexdigest()


def names_of(path: Path, categories: Sequence[Any]) -> dict[Any, str]:
    """Return category names by id. Raises DataError if a category lacks its name or id, or if two share an id."""
    try:
        ids, names = [each["id"] for each in categories], [str(each["name"]) for each in categories]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: a category has no id or no name ({error!r})") from None
    require_ids(path, "categories", ids)
    return dict(zip(ids, names, strict=True))


def listed_images(path: Path, images: Iterable[Any]) -> list[ListedImage]:
    """Return the images in the order of their ids. Raises DataError for an invalid entry."""
    listed = [listed_image(path, entry) for entry in images]
    require_ids(path, "images", [image.id for image in listed])
    return sorted(listed, key=lambda image: image.id)


def listed_image(path: Path, entry: Any) -> ListedImage:
    try:
        image = ListedImage(entry["id"], "" + entry["file_name"], int(entry["height"]), int(entry["width"]))
        if all(0 < side <= LONGEST_SIDE for side in (image.height, image.width)):
            return image
    except (KeyError, TypeError, ValueError, OverflowError):
        pass  # treated like an impossible side
    raise DataError(f"{path}: an image has no id, file_name, height or width that can be used: {str(entry):.100}")


def by_image(path: Path, annotations: Iterable[Any]) -> dict[Any, list[dict[str, Any]]]:
    """Return the annotations by their image ids. Raises DataError for an annotation that cannot have an image."""
    grouped: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in annotations:
        try:
            grouped[annotation.get("image_id")].append(annotation)
        except (AttributeError, TypeError):
            raise DataError(f"{path}: an annotation has no image_id: {str(annotation):.100}") from None
    return grouped


def require_ids(path: Path, what: str, ids: Sequence[Any]) -> None:
    """Raise DataError for ids that cannot be told apart or ordered."""
    for each in ids:
        if not isinstance(each, str) and not is_finite(each):  # nan is equal to no other id
            raise DataError(f"{path}: an id of {what} is {each!r:.50}, neither a number nor a text; renumber them")
    if len({isinstance(each, str) for each in ids}) > 1:
        raise DataError(f"{path}: ids of {what} are numbers and texts; give all of them one kind")
    if (twice := repeated(ids)) is not None:
        raise DataError(f"{path}: two {what} have the id {twice}, so annotations of it may mean either; renumber them")
