"""Turn one image of the source into the bytes that a .beton file keeps.

    plain JPEG, no resize needed    its own bytes, untouched: no generation loss, and no time
    plain JPEG                      decoded (very large ones at 1/2, 1/4 or 1/8), shrunk, encoded again
    anything else                   the same, decoded by PIL: CMYK, PNG, an incomplete JPEG, ... (see pil_image)
    by --raw_fraction               its pixels, unless they exceed a page

`jpeg_header` says which JPEGs are plain. FFCV's pixels differ from PIL's by 1.2/255 on average in any .beton file,
because FFCV asks for libjpeg's fast inverse DCT. EXIF orientation is ignored, as by FFCV and torchvision's loaders.
Only a TIFF is turned, because PIL itself turns it, for torchvision's loaders too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from lbsgd.convert.jpeg_header import plain_size
from lbsgd.convert.settings import MAX_SIDE, Settings
from lbsgd.data.beton_format import JPEG, RAW
from lbsgd.data.pil_image import ImageError, has_16_bits, library_errors, opencv_may_refuse, opened, rgb_pixels
from lbsgd.errors import DataError
from lbsgd.output import discard

Size = tuple[int, int]  # (width, height)
Lock = AbstractContextManager[Any]

COPIED, ENCODED, PIXELS, UNDECODABLE = 0, 1, 2, 255  # what became of an image
SCALED = 16  # added to the kind of an image whose samples had 16 bits
KINDS = {"copied": COPIED, "encoded": ENCODED, "raw": PIXELS}
MODES = {COPIED: JPEG, ENCODED: JPEG, PIXELS: RAW}
JPEG_SIDE = 65_500  # the most that libjpeg writes
BIG = 60_000_000  # bytes; work that needs more is done by one process at a time, to bound the memory of all
PIL_BYTES = 12  # the most per pixel that PIL decodes: its own two copies, and NumPy's
NO_LOCK: Lock = contextlib.nullcontext()


class Stored(NamedTuple):
    kind: int  # COPIED, ENCODED or PIXELS
    width: int
    height: int
    data: bytes | np.ndarray
    scaled: bool = False  # from 16 bits per sample to 8

    @property
    def view(self) -> memoryview:
        """The bytes, without a copy."""
        return memoryview(self.data) if isinstance(self.data, bytes) else self.data.data


def stored_image(data: bytes, index: int, settings: Settings, page_size: int, memory_lock: Lock = NO_LOCK) -> Stored:
    """Return what is kept of image `index`, whose bytes are `data`. Raises ImageError if it cannot be kept.

    memory_lock: shared by all processes and reentrant. It is held from the decoding of a big image until only the
    result is left.
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
    """Name an image whose decoding runs out of memory. It is not damaged, so it is not left out."""
    try:
        yield
    except MemoryError as error:
        raise DataError(f"{place()}: not enough memory to decode it; give fewer --num_processes") from error


def quiet_opencv() -> None:
    """Limit OpenCV to one core in this process, and discard libjpeg's warnings, as PIL does."""
    import cv2

    cv2.setNumThreads(1)
    discard(2)


@contextlib.contextmanager
def without_opencv_threads() -> Iterator[None]:
    """Run without OpenCV's threads, because a forked process would wait for threads that it does not have."""
    import cv2

    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def libraries() -> dict[str, str]:
    """Return the versions of the libraries that decode and encode. Other versions may give other bytes."""
    import cv2
    import PIL

    return {"opencv": cv2.__version__, "pillow": PIL.__version__}


# --- memory -----------------------------------------------------------------------------------------------------------


def lock_if_big(memory_lock: Lock, num_bytes: int) -> Lock:
    """Return memory_lock, which bounds the memory of all processes, if an image needs much memory, else no lock."""
    return memory_lock if num_bytes > BIG else NO_LOCK


def _needed_bytes(data: bytes, plain: Size | None, target: Size | None) -> int:
    """Return the bytes of memory that decoding takes. plain: the size of a plain JPEG, decoded to at least `target`."""
    if plain is None or target is None:
        image = opened(data)
        return PIL_BYTES * image.width * image.height
    num_pixels = math.prod(plain)
    # A progressive JPEG's coefficients, two bytes each, are all kept until the last scan, at any decoded size.
    coefficients = 6 * num_pixels if 6 * num_pixels > BIG and b"\xff\xc2" in data else 0
    return 3 * num_pixels // _fraction(plain, target) ** 2 + coefficients


def _fraction(size: Size, target: Size) -> int:
    """Return the largest of 8, 4 and 2 such that 1/8, 1/4 or 1/2 of each side is still twice the target, else 1.

    libjpeg can decode a JPEG at these fractions.
    """
    fits = (f for f in (8, 4, 2) if size[0] >= 2 * f * target[0] and size[1] >= 2 * f * target[1])
    return next(fits, 1)


# --- pixels: uint8 (height, width, 3) in OpenCV's order, blue first, which saves two conversions ----------------------


def decode(data: bytes, memory_lock: Lock = NO_LOCK) -> np.ndarray:
    """Return PIL's pixels in OpenCV's order. The content decides the format, not the name. Raises ImageError."""
    size = plain_size(data)
    with lock_if_big(memory_lock, _needed_bytes(data, size, size)):
        return _decoded(data, size, size, memory_lock)[0]


def _decoded(data: bytes, plain: Size | None, target: Size | None, memory_lock: Lock) -> tuple[np.ndarray, bool]:
    """Return the pixels, and whether they were scaled from 16 bits."""
    pixels = _decode_plain(data, plain, target) if plain and target else None
    return _decode_by_pil(data, memory_lock) if pixels is None else (pixels, False)


def _decode_plain(data: bytes, size: Size, target: Size) -> np.ndarray | None:
    """Return libjpeg-turbo's pixels through OpenCV, in two thirds of PIL's time. None if OpenCV refuses the file.

    Decoding at 1/2, 1/4 or 1/8 of each side is cheaper still. It is done if the result is still at least twice the
    target. It moves pixels by 0.04/255 on average at max_side 500 and by 0.006/255 at short_side 256 (300 images of
    ImageNet).
    """
    import cv2

    fraction = _fraction(size, target)
    flag = cv2.IMREAD_COLOR if fraction == 1 else getattr(cv2, f"IMREAD_REDUCED_COLOR_{fraction}")
    with opencv_may_refuse():
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
