"""One image of the source -> the bytes that a .beton file keeps of it.

    plain JPEG, no resize needed    its own bytes, untouched: no generation loss, and no time
    plain JPEG                      decoded (very large ones at 1/2, 1/4 or 1/8), shrunk, encoded again
    anything else                   the same, decoded by PIL: CMYK, PNG, an incomplete JPEG, ... (see pil_image)
    by --raw_fraction               its pixels, unless they exceed a page

`jpeg_header` says which JPEGs are plain. FFCV's pixels differ from PIL's by 1.2/255 on average, whoever wrote the file,
because FFCV asks for libjpeg's fast inverse DCT. EXIF orientation is ignored, as FFCV and torchvision's loaders do.
Only a TIFF comes out turned: PIL itself turns it, for torchvision's loaders too.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from lbsgd.convert.jpeg_header import plain_size
from lbsgd.convert.settings import MAX_SIDE, Settings
from lbsgd.data.beton_format import JPEG, RAW
from lbsgd.data.pil_image import ImageError, has_16_bits, library_errors, opened, rgb_pixels
from lbsgd.errors import DataError

Size = tuple[int, int]  # (width, height)
Lock = AbstractContextManager[Any]

COPIED, ENCODED, PIXELS, UNDECODABLE = 0, 1, 2, 255  # what became of an image
SCALED = 16  # is added to the kind of an image whose samples had 16 bits
KINDS = {"copied": COPIED, "encoded": ENCODED, "raw": PIXELS}
MODES = {COPIED: JPEG, ENCODED: JPEG, PIXELS: RAW}
JPEG_SIDE = 65_500  # the most that libjpeg writes
BIG = 60_000_000  # bytes; one process at a time does what needs more, which bounds the memory of all
PIL_BYTES = 12  # per pixel that PIL decodes, at most: its own two copies, and NumPy's
NO_LOCK: Lock = contextlib.nullcontext()


class Stored(NamedTuple):
    kind: int  # COPIED, ENCODED or PIXELS
    width: int
    height: int
    data: bytes | np.ndarray
    scaled: bool = False  # from 16 bits per sample to 8

    @property
    def view(self) -> memoryview:
        """The bytes, not copied."""
        return memoryview(self.data) if isinstance(self.data, bytes) else self.data.data


def stored_image(data: bytes, index: int, settings: Settings, page_size: int, memory_lock: Lock = NO_LOCK) -> Stored:
    """Return what is kept of image `index` with these bytes. Raises ImageError.

    memory_lock: shared by all processes; its holder may take it again. It is held while a big image is decoded, until
    only the result is left.
    """
    size = plain_size(data)
    target = settings.size(*size) if size else None
    raw = settings.is_raw(index) and not (target and 3 * math.prod(target) > page_size)  # a JPEG is smaller
    if size and size == target and not (raw or settings.reencode) and len(data) <= page_size:
        return Stored(COPIED, *size, data)
    with lock_if_big(memory_lock, _needed_bytes(data, size, target)):
        pixels, scaled = _decoded(data, size, target, memory_lock)
        # Only the pixels tell the size of what PIL decodes: it turns a TIFF meanwhile.
        pixels = _resized(pixels, target or settings.size(*pixels.shape[1::-1]))
        height, width = pixels.shape[:2]
        raw = raw and pixels.nbytes <= page_size
        if max(width, height) > (most := MAX_SIDE if raw else JPEG_SIDE):
            holder = "a .beton file" if raw else "a JPEG"
            raise ImageError(f"{width} x {height} pixels, and {holder} holds sides of at most {most:,}")
        kept = np.ascontiguousarray(pixels[:, :, ::-1]).reshape(-1) if raw else _encoded(pixels, settings.quality)
    if len(kept) > page_size:
        raise ImageError(f"{width} x {height} pixels are {len(kept):,} bytes, more than a page of {page_size:,}")
    return Stored(PIXELS if raw else ENCODED, width, height, kept, scaled)


# --- errors -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def out_of_memory_is_told(place: Callable[[], str]) -> Iterator[None]:
    """Name the place of an image if its decoding runs out of memory; it is not damaged, so it is not left out."""
    try:
        yield
    except MemoryError as error:
        raise DataError(f"{place()}: not enough memory to decode it; give fewer --num_processes") from error


def quiet_opencv() -> None:
    """Give OpenCV one core of this process, and send libjpeg's warnings nowhere, as PIL does."""
    import cv2

    cv2.setNumThreads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@contextlib.contextmanager
def without_opencv_threads() -> Iterator[None]:
    """End OpenCV's threads meanwhile, if it has any: a forked process would wait for threads that it does not have."""
    import cv2

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def libraries() -> dict[str, str]:
    """Return the versions of the libraries that decode and encode; others may give other bytes."""
    import cv2
    import PIL

    return {"opencv": cv2.__version__, "pillow": PIL.__version__}


# --- memory -----------------------------------------------------------------------------------------------------------


def lock_if_big(memory_lock: Lock, num_bytes: int) -> Lock:
    """Return the lock that bounds the memory of all processes if an image needs much memory, else no lock."""
    return memory_lock if num_bytes > BIG else NO_LOCK


def _needed_bytes(data: bytes, plain: Size | None, target: Size | None) -> int:
    """Return the memory that decoding takes. plain is the size of a plain JPEG, decoded to the target or more."""
    if plain is None or target is None:
        image = opened(data)
        return PIL_BYTES * image.width * image.height
    num_pixels = math.prod(plain)
    # A progressive JPEG's coefficients, two bytes each, are all kept until its last scan, whatever it is decoded to.
    coefficients = 6 * num_pixels if 6 * num_pixels > BIG and b"\xff\xc2" in data else 0
    return 3 * num_pixels // _fraction(plain, target) ** 2 + coefficients


def _fraction(size: Size, target: Size) -> int:
    """Return 2, 4 or 8 if decoding 1/2, 1/4 or 1/8 of each side, as libjpeg can, leaves twice the target; else 1."""
    fits = (f for f in (8, 4, 2) if size[0] >= 2 * f * target[0] and size[1] >= 2 * f * target[1])
    return next(fits, 1)


# --- pixels: uint8 (height, width, 3) in OpenCV's order, blue first, which spares two conversions ---------------------


def decode(data: bytes, memory_lock: Lock = NO_LOCK) -> np.ndarray:
    """Return the pixels as PIL sees them, in OpenCV's order; the content counts, not the name. Raises ImageError."""
    size = plain_size(data)
    with lock_if_big(memory_lock, _needed_bytes(data, size, size)):
        return _decoded(data, size, size, memory_lock)[0]


def _decoded(data: bytes, plain: Size | None, target: Size | None, memory_lock: Lock) -> tuple[np.ndarray, bool]:
    """Return the pixels, and whether they were scaled from 16 bits."""
    pixels = _decode_plain(data, plain, target) if plain and target else None
    return _decode_by_pil(data, memory_lock) if pixels is None else (pixels, False)


def _decode_plain(data: bytes, size: Size, target: Size) -> np.ndarray | None:
    """Return libjpeg-turbo's pixels by way of OpenCV, in two thirds of PIL's time; None if it refuses the file.

    Decoding 1/2, 1/4 or 1/8 of each side is cheaper still. It is done if at least twice the target remains to be
    shrunk, and moves pixels by 0.04/255 on average at max_side 500 and by 0.006/255 at short_side 256 (300 images of
    ImageNet).
    """
    import cv2

    fraction = _fraction(size, target)
    flag = cv2.IMREAD_COLOR if fraction == 1 else getattr(cv2, f"IMREAD_REDUCED_COLOR_{fraction}")
    with contextlib.suppress(cv2.error):
        return cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    return None


def _decode_by_pil(data: bytes, memory_lock: Lock) -> tuple[np.ndarray, bool]:
    image = opened(data)
    with lock_if_big(memory_lock, PIL_BYTES * image.width * image.height):
        scaled, pixels = has_16_bits(image), rgb_pixels(image, data)
        return np.ascontiguousarray(pixels[:, :, ::-1]), scaled


def _resized(pixels: np.ndarray, size: Size) -> np.ndarray:
    import cv2

    if pixels.shape[1::-1] == size:
        return pixels
    with library_errors():
        return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def _encoded(pixels: np.ndarray, quality: int) -> np.ndarray:
    import cv2

    with library_errors():
        written, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])  # 4:2:0, as FFCV chooses
    if not written:
        raise ImageError("OpenCV cannot encode it as a JPEG")
    return data.reshape(-1)
