"""JPEG bytes and a crop in, pixels out: crop_jpeg.c's decoder where it was compiled, else FFCV's of whole images."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import numpy as np
from numba import njit

BESIDE = 64  # columns that may come with a crop, as only whole blocks can be left out: at most 2 x 16, and 2 on each side


def library() -> Optional[ctypes.CDLL]:
    """The compiled decoder, or None where the package was installed without a C compiler."""
    for path in Path(__file__).parent.glob("_crop_jpeg*.so"):
        return ctypes.CDLL(str(path))
    return None


def crop_decoder(compiled: ctypes.CDLL) -> Callable:
    """decode(data, height, width, top, left, h, w) -> (pixels, first row, first column, damaged), compiled.

    data: the bytes of a JPEG of height x width. The crop of h x w at (top, left) is at (first row, first column) of pixels,
    uint8 (rows, columns, 3). damaged: the data there is not what an encoder wrote.
    """
    decode_crop = compiled.lbsgd_decode_crop
    decode_crop.restype = ctypes.c_long
    decode_crop.argtypes = [ctypes.c_void_p, *[ctypes.c_long] * 5, ctypes.c_void_p, ctypes.c_long]

    @njit(nogil=True)
    def decode(data, height, width, top, left, h, w):
        pixels = np.empty(h * min(width, w + BESIDE) * 3, np.uint8)
        found = decode_crop(data.ctypes.data, len(data), top, left, h, w, pixels.ctypes.data, len(pixels))
        if found < 0:
            return np.empty((h, w, 3), np.uint8), 0, 0, True
        first, columns = found >> 32, found & 0xFFFFFFFF
        return pixels[:h * columns * 3].reshape(h, columns, 3), 0, left - first, False

    return decode


def whole_image_decoder(decode_jpeg: Callable) -> Callable:
    """`crop_decoder`'s interface over FFCV's compiled imdecode."""

    @njit(nogil=True)
    def decode(data, height, width, top, left, h, w):
        pixels = np.empty(height * width * 3, np.uint8)
        status = decode_jpeg(data, pixels, height, width, height, width, 0, 0, 1, 1, False, False)
        return pixels.reshape(height, width, 3), top, left, status != 0

    return decode
