"""Decode images with PIL, which takes everything but plain JPEGs; 16-bit samples become 8-bit, others are refused.

    8 bits                            PIL's conversion to RGB
    16 bits, grey or colour           value / 257, rounded: 65,535 is 255
    12 or 32 bits, signed, floats     ImageError, because it is unknown which value is white

PIL itself clips 16-bit grey to 255, which makes such images white.

PIL's decoders raise nearly anything for a damaged file. `library_errors` turns all of it into ImageError, around calls
of PIL and OpenCV only, so that a bug in our own code stays a traceback and never passes for a damaged image.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

OPENCV_OUT_OF_MEMORY = -4  # cv2.Error.StsNoMem
BITS, PHOTOMETRIC, ORIENTATION = 258, 262, 274  # tags of TIFF and EXIF
WHITE_IS_ZERO = 0
WHITE = 65_535
STRIPE = 256  # rows to scale at a time
# PIL decodes an EPS by running Ghostscript, and an IPTC file may hold an EPS. A file of any name may be either.
RUN_A_PROGRAM = ("EPS", "IPTC")


class ImageError(ValueError):
    """An image cannot be decoded, or its result cannot be stored."""


@contextlib.contextmanager
def library_errors() -> Iterator[None]:
    """Turn errors of PIL and OpenCV into ImageError, and drop PIL's warnings, such as of corrupt EXIF or many pixels.

    Wrap only calls of these libraries: an exception in our own code is a bug, and must not pass for a damaged image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MemoryError:
        raise
    except Exception as error:
        if getattr(error, "code", None) == OPENCV_OUT_OF_MEMORY:
            raise MemoryError(str(error)) from error
        raise ImageError(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def opencv_may_refuse() -> Iterator[None]:
    """Pass over an image that OpenCV refuses, because PIL may open it. Without memory, PIL would give other pixels."""
    import cv2

    try:
        yield
    except cv2.error as error:
        if error.code == OPENCV_OUT_OF_MEMORY:
            raise MemoryError(str(error)) from error


def opened(data: bytes | BinaryIO) -> Image.Image:
    """Return PIL's image from its bytes or a file, with only the header read. Raises ImageError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with library_errors():
            image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
    except ImageError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):  # its text is an address in memory
            raise ImageError("no image that PIL knows" if data else "an empty file") from error.__cause__
        raise
    if image.format in RUN_A_PROGRAM:
        raise ImageError(f"an {image.format} file, for which PIL would run another program")
    return image


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, by which pixels from `rgb_pixels` must still be turned; 1 is upright.

    It may come after a PNG's pixels, and in XMP instead of EXIF. PIL itself turns a TIFF when it decodes it. An
    unreadable orientation counts as upright, as in other programs.
    """
    from PIL import Image

    try:
        with library_errors():
            if getattr(image, "tile", None):  # OpenCV has decoded the image, and PIL has not read it to the end
                image.load()
            orientation = Image.Image.getexif(image).get(ORIENTATION, 1)  # a PNG's getexif would decode a closed image
    except ImageError:
        return 1
    return int(orientation) if orientation in range(1, 9) else 1


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return a view of pixels (height, width, 3), turned upright by their EXIF orientation."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    rows, columns = ((1, 1), (1, -1), (-1, -1), (-1, 1))[(orientation - 1) % 4]
    return pixels[::rows, ::columns]


def unusable_depth(image: Image.Image) -> str | None:
    """Return the kind of an image's samples if they cannot be converted to 8 bits, else None."""
    if image.mode == "F":
        return "floating-point"
    if image.mode.startswith("I;16"):
        bits = _tag(image, BITS, (16,))[0]
        return None if bits == 16 else f"{bits}-bit"
    if image.mode == "I" and image.format != "PPM":  # PIL scales a PPM to 0 ... 65,535, whatever its largest value
        return "32-bit or signed"
    return None


def has_16_bits(image: Image.Image) -> bool:
    """Return whether an image's samples are scaled from 16 bits to 8."""
    how = str(_decoder_arguments(image))
    packed = "BGR;16" in how  # three samples of 5 or 6 bits, as in a BMP
    return image.mode.startswith("I") or (";16" in how and not packed) or (image.format == "PPM" and str(WHITE) in how)


def _decoder_arguments(image: Image.Image) -> object:
    """Return the arguments of PIL's decoder, such as RGB;16B, or RGB and the largest value of a PPM."""
    tiles = getattr(image, "tile", None)
    return tiles[0][3] if tiles else ""


def rgb_pixels(image: Image.Image, data: bytes) -> np.ndarray:
    """Return uint8 (height, width, 3), red first, and close the image. data: the file's bytes. Raises ImageError."""
    if depth := unusable_depth(image):
        raise ImageError(f"{depth} samples, of which nobody can tell which is white")
    if image.mode.startswith("I"):
        return _grey_of_16_bits(image)
    if has_16_bits(image) and (pixels := _colours_of_16_bits(image, data)) is not None:
        return pixels
    with library_errors():
        converted = image.convert("RGB")
        image.close()  # frees its pixels before more copies are made
        return np.asarray(converted)


def _grey_of_16_bits(image: Image.Image) -> np.ndarray:
    white_is_zero = _tag(image, PHOTOMETRIC, 1) == WHITE_IS_ZERO
    with library_errors():
        samples = np.asarray(image)
        image.close()
    grey = _in_8_bits(samples)
    return np.repeat((255 - grey if white_is_zero else grey)[:, :, None], 3, axis=2)


def _colours_of_16_bits(image: Image.Image, data: bytes) -> np.ndarray | None:
    """Return OpenCV's pixels, scaled; None if OpenCV does not return three colours, and PIL's high bytes must do."""
    try:
        import cv2
    except ImportError:  # detection works without OpenCV
        return None
    if image.format not in ("PNG", "TIFF", "PPM") or _tag(image, ORIENTATION, 1) != 1:
        return None
    with opencv_may_refuse():
        samples = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if samples is not None and samples.dtype == np.uint16 and samples.shape[2:] in ((3,), (4,)):
            return _in_8_bits(samples[:, :, 2::-1])
    return None


def _in_8_bits(samples: np.ndarray) -> np.ndarray:
    """Return round(samples / 257), some rows at a time, so that no copy is larger than the image."""
    scaled = np.empty(samples.shape, np.uint8)
    for at in range(0, len(samples), STRIPE):
        scaled[at : at + STRIPE] = (samples[at : at + STRIPE].astype(np.uint32) + 128) // 257
    return scaled


def _tag(image: Image.Image, number: int, default: Any) -> Any:
    """Return a TIFF's tag, or the default for any other file."""
    return getattr(image, "tag_v2", {}).get(number, default)
