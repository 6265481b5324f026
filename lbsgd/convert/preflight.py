"""What is said, or refused, before the first image is converted."""

from __future__ import annotations

from lbsgd.convert.source_images import Images, Source
from lbsgd.data.pil_image import ImageError, opened, unusable_depth
from lbsgd.errors import DataError
from lbsgd.units import counted, shortened

ANY_DEPTH = (".tif", ".tiff", ".pgm", ".ppm")  # formats whose samples may be anything, floats among it


def left_out_lines(source: Source) -> list[str]:
    """Return a line for each split that leaves something out of its folder or archive."""
    splits = source.splits.items()
    return [f"left out of {name}: {images.left_out}" for name, images in splits if images.left_out.counts]


def unusable_images(source: Source) -> list[str]:
    """Return the images whose samples are no 8 or 16 bits, each with its reason, from their headers alone.

    Only files of the suffixes of ANY_DEPTH are read. A header that PIL does not take is left to the conversion.
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


def refuse_unusable(source: Source) -> None:
    """Raise DataError if there are images whose samples are no 8 or 16 bits."""
    if unusable := unusable_images(source):
        raise DataError(f"{source.path}: {unusable_line(unusable)}")
