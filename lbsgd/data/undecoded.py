"""Decide whether an image that was not fully decoded ends a run, and say why."""

from __future__ import annotations

from lbsgd.data.beton import BetonFile
from lbsgd.data.native.kernels import NO_MEMORY, NOT_DECODED
from lbsgd.errors import DataError


def require_usable(beton: BetonFile, image: int, status: int) -> None:
    """Raise DataError for an image whose status is not DONE, unless its source had the same damage.

    The decoder makes up pixels of such an image, as PIL does. An image without any pixels would be a black image with
    its class's label, so it always ends the run.
    """
    if status == NO_MEMORY:
        raise DataError(
            f"no memory is left to decode image {image} of {beton.path}; run fewer processes on this host, or give "
            "each of them fewer --loader_threads or a smaller --micro_batch"
        )
    if not beton.is_as_converted(image):
        raise DataError(
            f"image {image} of {beton.path} is damaged; copy the file again, or find all damaged images with "
            "lbsgd convert --verify"
        )
    if status == NOT_DECODED:
        raise DataError(
            f"image {image} of {beton.path} cannot be decoded, and its source was as damaged; make the data again "
            "without it: lbsgd convert --reencode --on_error skip lists and leaves out such images"
        )
