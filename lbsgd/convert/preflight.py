"""Report or refuse a source's defects: most before the first image is converted, emptied classes after the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lbsgd.convert.source_images import Images, Source
from lbsgd.data.pil_image import ImageError, opened, unusable_depth
from lbsgd.errors import DataError
from lbsgd.units import counted, shortened

SUBSET = "give --val_subset if that is meant, as in the paper's ImageNet-5k: errors are then among the other classes"
ANY_DEPTH = (".tif", ".tiff", ".pgm", ".ppm")  # formats whose samples may have any type, even float


def left_out_lines(source: Source) -> list[str]:
    """Return a line for each split that leaves something out of its folder or archive."""
    splits = source.splits.items()
    return [f"left out of {name}: {images.left_out}" for name, images in splits if images.left_out.counts]


def warning_lines(source: Source) -> list[str]:
    """Return a warning if all images are of one class, for example of a folder between train/ and the classes."""
    train = source.train
    if len(train.classes) > 1:
        return []
    said = f"warning: {train.origin} has one class, {train.classes[0]}, with which nothing can be learned"
    in_shards = train.shard_names or train.copied_from
    return [said if in_shards else f"{said}; a folder between train/ and the classes is one too many"]


def unusable_images(source: Source) -> list[str]:
    """Return the images whose samples do not have 8 or 16 bits, each with its reason, from their headers alone.

    Only files with a suffix in ANY_DEPTH are read. A header that PIL cannot read is left to the conversion.
    """
    return [wrong for images in source.splits.values() for wrong in _unusable(images)]


def _unusable(images: Images) -> list[str]:
    reader, found = images.reader(), []
    for index, name in enumerate(images.names):
        if name.lower().endswith(ANY_DEPTH):
            try:
                with reader.file(images.member(index)) as file:
                    depth = unusable_depth(opened(file))
            except ImageError:
                continue
            if depth:
                found.append(f"{images.where(index)} ({depth} samples)")
    return found


def unusable_line(unusable: list[str]) -> str:
    return (
        f"{counted(len(unusable), 'image')} cannot become 8 bits, because nobody can tell which value is white: "
        f"{shortened(unusable)}; store them with 8 or 16 bits, or leave them out with --on_error skip"
    )


def unvalidated_line(source: Source) -> str | None:
    """Return what to say of classes without validation images, or None if there are none."""
    counts = np.bincount(source.val.labels, minlength=len(source.val.classes)).tolist()
    lacking = _lacking(source.val, counts, "validation images")
    return f"{lacking}; complete it, or {SUBSET}" if lacking else None


def _lacking(images: Images, counts: Sequence[int], what: str) -> str | None:
    """Return which classes have no images, by the images per class, or None if all have some."""
    without = [name for name, count in zip(images.classes, counts, strict=True) if not count]
    if not without:
        return None
    return f"{images.origin} has no {what} of {len(without):,} of {len(images.classes):,} classes: {shortened(without)}"


def refuse_emptied(source: Source, counts: Mapping[str, Sequence[int]], val_subset: bool) -> None:
    """Raise DataError if no image of a class is left in a split that must have some.

    counts: the images per class that could be decoded, by split. val_subset: whether classes may have no validation
    images.
    """
    if lacking := _lacking(source.train, counts["train"], "training images that can be decoded"):
        raise DataError(f"{lacking}; replace them, or remove the class from the source")
    lacking = _lacking(source.val, counts["val"], "validation images that can be decoded")
    if lacking and not val_subset:
        raise DataError(f"{lacking}; replace them, or {SUBSET}")


def refuse_unvalidated(source: Source) -> None:
    """Raise DataError if a class has no validation images."""
    if line := unvalidated_line(source):
        raise DataError(line)


def refuse_unusable(source: Source) -> None:
    """Raise DataError if there are images whose samples do not have 8 or 16 bits."""
    if unusable := unusable_images(source):
        raise DataError(f"{source.path}: {unusable_line(unusable)}")
