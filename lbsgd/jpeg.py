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
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lbsgd.beton import JPEG, RAW
from lbsgd.errors import ConfigError

COPIED, ENCODED, PIXELS, UNDECODABLE = 0, 1, 2, 255  # what became of an image
KINDS = {"copied": COPIED, "encoded": ENCODED, "raw": PIXELS}
MODES = {COPIED: JPEG, ENCODED: JPEG, PIXELS: RAW}
MAX_SIDE = 65_535  # FFCV's sizes are uint16
BIG = 20_000_000  # pixels; such an image is decoded by one process at a time, which bounds the memory of all


@dataclass(frozen=True)
class Settings:
    """What the result depends on, besides the source: how images are shrunk, and which are kept as what."""

    max_side: int | None = None  # pixels of the longer side, FFCV's convention
    short_side: int | None = None  # pixels of the shorter side, torchvision's Resize
    quality: int = 90
    raw_fraction: float = 0.0  # of the images, kept as pixels (FFCV's proportion mode)
    reencode: bool = False  # every JPEG, also one that could be kept untouched

    def __post_init__(self) -> None:
        if (self.max_side is None) == (self.short_side is None):
            raise ConfigError("images are shrunk by --max_side or by --short_side: give one of the two")
        if not 1 <= self.side <= MAX_SIDE:
            raise ConfigError(f"--max_side or --short_side {self.side} is not 1 to {MAX_SIDE:,} pixels")
        if not (1 <= self.quality <= 100 and 0 <= self.raw_fraction <= 1):
            raise ConfigError(f"--quality {self.quality} must be 1 to 100 and --raw_fraction {self.raw_fraction} 0 to 1")

    @property
    def side(self) -> int:
        return self.short_side if self.max_side is None else self.max_side

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The size that an image is kept in; it is never enlarged, and never less than one pixel."""
        now = max(width, height) if self.short_side is None else min(width, height)
        if now <= self.side:
            return width, height
        ratio = self.side / now  # FFCV's arithmetic, so that sizes are FFCV's, and rounded down as torchvision does
        if self.short_side is None:
            return max(1, int(ratio * width)), max(1, int(ratio * height))
        return tuple(max(1, self.side * side // now) for side in (width, height))

    def is_raw(self, index: int) -> bool:
        """Whether image `index` is kept as pixels: evenly spread, so that each class has its share of them."""
        return int((index + 1) * self.raw_fraction) > int(index * self.raw_fraction)


class Stored(NamedTuple):
    kind: int
    width: int
    height: int
    data: bytes | np.ndarray


def stored_image(data: bytes, index: int, settings: Settings, page_size: int, big=contextlib.nullcontext()) -> Stored:
    """What is kept of an image. Raises any exception for one that cannot be decoded, as PIL's decoders do.

    big is held while a big image is decoded.
    """
    size, raw = plain_size(data), settings.is_raw(index)
    if size and not (raw or settings.reencode) and settings.size(*size) == size and len(data) <= page_size:
        return Stored(COPIED, *size, data)
    pixels = _decode_plain(data, size, settings.size(*size), big) if size else _decode(data, big)
    pixels = _resized(pixels, settings.size(*(size or pixels.shape[1::-1])))
    height, width = pixels.shape[:2]
    kept = np.ascontiguousarray(pixels[:, :, ::-1]).reshape(-1) if raw else _encode(pixels, settings.quality)
    if len(kept) > page_size or max(width, height) > MAX_SIDE:
        raise ValueError(f"{width} x {height} pixels are {len(kept):,} bytes, more than a page of {page_size:,}")
    return Stored(PIXELS if raw else ENCODED, width, height, kept)


# --- the header of a JPEG ---------------------------------------------------------------------------------------------

HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
DQT, DHT, SOS, DRI, APP0, APP14, COM = 0xDB, 0xC4, 0xDA, 0xDD, 0xE0, 0xEE, 0xFE
SUBSAMPLING = {(h, v, 1, 1, 1, 1) for h, v in ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))}


def plain_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a plain JPEG, None for everything else."""
    if data[:2] != b"\xff\xd8":
        return None
    with contextlib.suppress(IndexError):
        segments, scan = _segments(data)
        # In coded data FF is followed by 00 or a restart marker, so that FF D9 after its start is the image's end.
        complete = scan and (data.endswith(b"\xff\xd9") or data.find(b"\xff\xd9", scan) > 0)
        if complete and DQT in segments and DHT in segments:
            return _plain_frame(segments)
    return None


def _segments(data: bytes) -> tuple[dict[int, bytes], int]:
    """The header's segments by their markers, and where the first scan begins; 0 where something unusual comes before."""
    segments, at = {}, 2
    while data[at] == 0xFF:
        marker, end = data[at + 1], at + 2 + (data[at + 2] << 8 | data[at + 3])
        if marker == SOS:
            return segments, at
        if not (marker in (*HUFFMAN_FRAMES, DQT, DHT, DRI, COM) or APP0 <= marker < APP0 + 16):
            break
        name = data[at + 4:at + 9]
        if not APP0 <= marker < APP0 + 16 or (marker, name) in ((APP0, b"JFIF\0"), (APP14, b"Adobe")):
            segments[marker] = data[at + 4:end]
        at = end
    return segments, 0


def _plain_frame(segments: dict[int, bytes]) -> tuple[int, int] | None:
    frames = [segments[marker] for marker in HUFFMAN_FRAMES if marker in segments]
    if len(frames) != 1 or frames[0][0] != 8:
        return None
    [frame] = frames
    height, width, components = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4], frame[5]
    ids = tuple(frame[6:6 + 3 * components:3])
    sampling = tuple(value for packed in frame[7:7 + 3 * components:3] for value in (packed >> 4, packed & 15))
    adobe = segments[APP14][11] if APP14 in segments else None
    # libjpeg's rule for three components: YCbCr by JFIF, by Adobe's transform 1, or by the ids 1 2 3.
    ycbcr = (components == 3 and sampling in SUBSAMPLING and adobe in (None, 1)
             and (APP0 in segments or adobe == 1 or ids == (1, 2, 3)))
    return (width, height) if width and height and (ycbcr or components == 1) else None


# --- pixels: uint8 (height, width, 3) in OpenCV's order, blue first, which spares two conversions ---------------------


def decode(data: bytes) -> np.ndarray:
    """The image as PIL sees it, in OpenCV's order: its content counts, not its name."""
    size = plain_size(data)
    return _decode_plain(data, size, size) if size else _decode(data)


def _decode_plain(data: bytes, size: tuple[int, int], target: tuple[int, int], big=contextlib.nullcontext()) -> np.ndarray:
    """libjpeg-turbo's pixels by way of OpenCV, in two thirds of PIL's time.

    Decoding 1/2, 1/4 or 1/8 of each side is cheaper still. Done where at least twice the target remains to be shrunk, it
    moves pixels by 0.04 of 255 in the mean at max_side 500, and by 0.006 at short_side 256 (300 images of ImageNet).
    """
    import cv2

    scale, flag = 1, cv2.IMREAD_COLOR
    for fraction in (2, 4, 8):
        if all(side >= 2 * fraction * wanted for side, wanted in zip(size, target)):
            scale, flag = fraction, getattr(cv2, f"IMREAD_REDUCED_COLOR_{fraction}")
    pixels = None
    with big if size[0] * size[1] > BIG * scale else contextlib.nullcontext(), contextlib.suppress(cv2.error):
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION)
    return _decode(data, big) if pixels is None else pixels


def _decode(data: bytes, big=contextlib.nullcontext()) -> np.ndarray:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of corrupt EXIF, many pixels, and other things that do not stop PIL
        with Image.open(io.BytesIO(data)) as image, big if image.width * image.height > BIG else contextlib.nullcontext():
            return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])


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
