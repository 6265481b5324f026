"""What runs for every image of an epoch: crop_jpeg.c and pixels.c where they were compiled, else FFCV's own functions.

The crops of both are the same boxes. Their pixels differ a little: a compiled crop is decoded at a smaller scale where that
covers the output, and resized without OpenCV's rounding of places.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from lbsgd.data.crops import mirror


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where the package was installed without a C compiler."""
    for path in Path(__file__).parent.glob("_kernels*.so"):
        kernels, pointer, number = ctypes.CDLL(str(path)), ctypes.c_void_p, ctypes.c_long
        kernels.lbsgd_decode_crop.restype = number
        kernels.lbsgd_decode_crop.argtypes = [pointer, *[number] * 8, pointer, number]
        kernels.lbsgd_resize.restype = None
        kernels.lbsgd_resize.argtypes = [pointer, number, *[ctypes.c_double] * 4, number, pointer, number]
        kernels.lbsgd_normalise.restype = None
        kernels.lbsgd_normalise.argtypes = [pointer, number, number, *[pointer] * 3]
        return kernels
    return None


class Crops(NamedTuple):
    """Two compiled functions; destination is uint8 (R, R, 3), to which the crop of h x w at (top, left) is resized.

    of_jpeg(data, height, width, top, left, h, w, mirrored, destination) -> damaged: data are the bytes of a JPEG of
    height x width; damaged where they are not what an encoder wrote.
    of_pixels(pixels, top, left, h, w, mirrored, destination): pixels are uint8 (height, width, 3).
    """

    of_jpeg: Callable
    of_pixels: Callable


def our_crops(kernels: ctypes.CDLL) -> Crops:
    decode_crop, resize = kernels.lbsgd_decode_crop, kernels.lbsgd_resize

    @njit(nogil=True)
    def of_jpeg(data, height, width, top, left, h, w, mirrored, destination):
        status = decode_crop(
            data.ctypes.data,
            len(data),
            height,
            width,
            top,
            left,
            h,
            w,
            mirrored,
            destination.ctypes.data,
            len(destination),
        )
        if status == 2:
            destination[:] = 0
        return status != 0

    @njit(nogil=True)
    def of_pixels(pixels, top, left, h, w, mirrored, destination):
        resize(
            pixels.ctypes.data,
            3 * pixels.shape[1],
            top,
            left,
            h,
            w,
            mirrored,
            destination.ctypes.data,
            len(destination),
        )

    return Crops(of_jpeg, of_pixels)


def ffcv_crops(decode_jpeg: Callable, resize: Callable) -> Crops:
    """FFCV's compiled imdecode and resize_crop, the first of which decodes whole images."""

    @njit(nogil=True)
    def of_pixels(pixels, top, left, h, w, mirrored, destination):
        resize(pixels, top, top + h, left, left + w, destination)
        if mirrored:
            mirror(destination)

    @njit(nogil=True)
    def of_jpeg(data, height, width, top, left, h, w, mirrored, destination):
        pixels = np.zeros(height * width * 3, np.uint8)
        status = decode_jpeg(data, pixels, height, width, height, width, 0, 0, 1, 1, False, False)
        of_pixels(pixels.reshape(height, width, 3), top, left, h, w, mirrored, destination)
        return status != 0

    return Crops(of_jpeg, of_pixels)
