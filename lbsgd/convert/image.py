"""One image of the source -> the bytes that a .beton file keeps of it.

    plain JPEG, no resize needed    its own bytes, untouched: no generation loss, and no time
    plain JPEG                      decoded (very large ones at 1/2, 1/4 or 1/8), shrunk, encoded again
    anything else                   the same, decoded by PIL: CMYK, PNG, a JPEG that is not complete, ...

A JPEG is plain where every libjpeg-turbo takes it for the same pixels without being told anything: YCbCr or grey, eight
bits, Huffman coding, usual subsampling, all tables, and its end. PIL's and OpenCV's are then equal bit by bit. FFCV's
differ from them by 1.2 of 255 in the mean, whoever wrote the file, as it asks for libjpeg's fast inverse DCT. EXIF
orientation is ignored, as FFCV and torchvision's loaders do.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from typing import NamedTuple

import numpy as np

from lbsgd.convert.jpeg_header import plain_size
from lbsgd.convert.settings import MAX_SIDE, Settings
from lbsgd.data.beton import JPEG, RAW

COPIED, ENCODED, PIXELS, UNDECODABLE = 0, 1, 2, 255  # what became of an image
KINDS = {"copied": COPIED, "encoded": ENCODED, "raw": PIXELS}
MODES = {COPIED: JPEG, ENCODED: JPEG, PIXELS: RAW}
BIG = 60_000_000  # bytes; what needs more is done by one process at a time, which bounds the memory of all
PIL_BYTES = 12  # of memory, at most, for each pixel that PIL decodes: its own two copies, and NumPy's


class Stored(NamedTuple):
    kind: int
    width: int
    height: int
    data: bytes | np.ndarray


def stored_image(data: bytes, index: int, settings: Settings, page_size: int, big=contextlib.nullcontext()) -> Stored:
    """What is kept of an image. Raises any exception for one that cannot be decoded, as PIL's decoders do.

    big, a lock that may be taken again by who holds it, is held from when a big image is decoded until only its result is left.
    """
    size, raw = plain_size(data), settings.is_raw(index)
    if size and not (raw or settings.reencode) and settings.size(*size) == size and len(data) <= page_size:
        return Stored(COPIED, *size, data)
    with room(big, _needed_bytes(data, size, size and settings.size(*size))):
        pixels = _decode_plain(data, size, settings.size(*size), big) if size else _decode(data, big)
        pixels = _resized(pixels, settings.size(*(size or pixels.shape[1::-1])))  # PIL turns a TIFF while it decodes it
        height, width = pixels.shape[:2]
        kept = np.ascontiguousarray(pixels[:, :, ::-1]).reshape(-1) if raw else _encode(pixels, settings.quality)
    if len(kept) > page_size or max(width, height) > MAX_SIDE:
        raise ValueError(f"{width} x {height} pixels are {len(kept):,} bytes, more than a page of {page_size:,}")
    return Stored(PIXELS if raw else ENCODED, width, height, kept)


# --- pixels: uint8 (height, width, 3) in OpenCV's order, blue first, which spares two conversions ---------------------


def decode(data: bytes, big=contextlib.nullcontext()) -> np.ndarray:
    """The image as PIL sees it, in OpenCV's order: its content counts, not its name."""
    size = plain_size(data)
    if not size:
        return _decode(data, big)
    with room(big, _needed_bytes(data, size, size)):
        return _decode_plain(data, size, size, big)


def room(big, num_bytes: int):
    """The lock that bounds the memory of all processes, where one is about to take more than a little of it."""
    return big if num_bytes > BIG else contextlib.nullcontext()


def _needed_bytes(data: bytes, plain: tuple[int, int] | None, target: tuple[int, int] | None) -> int:
    """Memory that decoding takes; plain is the size of a plain JPEG, which is decoded to the target or more."""
    if not plain:
        return PIL_BYTES * math.prod(_size_by_pil(data))
    pixels = math.prod(plain)
    # A progressive JPEG's coefficients, two bytes each, are all kept until its last scan, whatever it is decoded to.
    coefficients = 6 * pixels if 6 * pixels > BIG and b"\xff\xc2" in data else 0
    return 3 * pixels // _fraction(plain, target) ** 2 + coefficients


def _fraction(size: tuple[int, int], target: tuple[int, int]) -> int:
    """libjpeg can decode 1/2, 1/4 or 1/8 of each side; what leaves at least twice the target is chosen."""
    return max(
        (
            fraction
            for fraction in (2, 4, 8)
            if all(side >= 2 * fraction * wanted for side, wanted in zip(size, target))
        ),
        default=1,
    )


def _decode_plain(
    data: bytes, size: tuple[int, int], target: tuple[int, int], big=contextlib.nullcontext()
) -> np.ndarray:
    """libjpeg-turbo's pixels by way of OpenCV, in two thirds of PIL's time.

    Decoding 1/2, 1/4 or 1/8 of each side is cheaper still. Done where at least twice the target remains to be shrunk, it
    moves pixels by 0.04 of 255 in the mean at max_side 500, and by 0.006 at short_side 256 (300 images of ImageNet).
    """
    import cv2

    fraction, pixels = _fraction(size, target), None
    flag = cv2.IMREAD_COLOR if fraction == 1 else getattr(cv2, f"IMREAD_REDUCED_COLOR_{fraction}")
    with contextlib.suppress(cv2.error):
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    return _decode(data, big) if pixels is None else pixels


def _decode(data: bytes, big=contextlib.nullcontext()) -> np.ndarray:
    with _opened(data) as image, room(big, PIL_BYTES * image.width * image.height):
        pixels = image.convert("RGB")
        image.close()  # frees its pixels before there are more copies
        pixels = np.asarray(pixels)  # and PIL's own are gone
        return np.ascontiguousarray(pixels[:, :, ::-1])


@contextlib.contextmanager
def _opened(data: bytes):
    """PIL's image, without its warnings of corrupt EXIF, many pixels and other things that do not stop it."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            yield image


def _size_by_pil(data: bytes) -> tuple[int, int]:
    with _opened(data) as image:
        return image.size


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    import cv2

    return pixels if pixels.shape[1::-1] == size else cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def _encode(pixels: np.ndarray, quality: int) -> np.ndarray:
    import cv2

    written, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])  # 4:2:0, FFCV's choice as well
    if not written:
        raise ValueError("OpenCV cannot encode it as a JPEG")
    return data.reshape(-1)


def libraries() -> dict[str, str]:
    """The versions of what decodes and encodes; others may give other bytes."""
    import cv2
    import PIL

    return {"opencv": cv2.__version__, "pillow": PIL.__version__}
