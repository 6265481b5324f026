"""The code that runs per image: crop_jpeg.c and pixels.c if they were compiled, else FFCV's own functions.

Both crop the same boxes. Their pixels differ slightly: our code decodes a crop at a smaller scale if that still covers
the output, and resizes without OpenCV's rounding of places.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np
from numba import njit, types
from numba.core.typing import signature

from lbsgd.data.beton_format import JPEG
from lbsgd.data.crops import mirror

# The status of an image. The C files return these numbers.
DONE, DAMAGED, NOT_DECODED, NO_MEMORY = range(4)
UNTOUCHED = 1, 254, 1  # the last pixel, before FFCV's imdecode writes it; Numba takes 5 s to compare arrays


class Crops(NamedTuple):
    """Two compiled functions that resize the crop of h x w at (top, left) to destination, uint8 (R, R, 3).

    of_jpeg(data, height, width, top, left, h, w, mirrored, destination) -> status: data are the bytes of a JPEG of
    height x width pixels.
    of_pixels(pixels, top, left, h, w, mirrored, destination) -> status: pixels are uint8 (height, width, 3).

    The status is DONE, DAMAGED (the decoder made up some pixels), NOT_DECODED (all pixels are 0) or NO_MEMORY.
    """

    of_jpeg: Callable
    of_pixels: Callable


def by_name(function: Any) -> Any:
    """Return a function of the kernels for compiled code, which finds it by name, not by address.

    An address differs from process to process, and code that holds one cannot be kept (`kept_code.py`).
    """
    numba_type = {ctypes.c_void_p: types.uintp, ctypes.c_long: types.intp, ctypes.c_double: types.float64}
    arguments = [numba_type[each] for each in function.argtypes]
    llvmlite.binding.add_symbol(function.__name__, ctypes.cast(function, ctypes.c_void_p).value)
    return types.ExternalFunction(function.__name__, signature(numba_type[function.restype], *arguments))


def our_crops(kernels: ctypes.CDLL) -> Crops:
    decode_crop, resize = by_name(kernels.lbsgd_decode_crop), by_name(kernels.lbsgd_resize)

    @njit(nogil=True)
    def of_jpeg(data, height, width, top, left, h, w, mirrored, destination):
        source, output, side = data.ctypes.data, destination.ctypes.data, len(destination)
        status = decode_crop(source, len(data), height, width, top, left, h, w, mirrored, output, side)
        if status == NOT_DECODED:
            destination[:] = 0
        return status

    @njit(nogil=True)
    def of_pixels(pixels, top, left, h, w, mirrored, destination):
        stride, output = 3 * pixels.shape[1], destination.ctypes.data
        return resize(pixels.ctypes.data, stride, top, left, h, w, mirrored, output, len(destination))

    return Crops(of_jpeg, of_pixels)


def ffcv_crops(decode_jpeg: Callable, resize: Callable) -> Crops:
    """Make crops from FFCV's compiled imdecode and resize_crop. imdecode decodes whole images."""

    @njit(nogil=True)
    def of_pixels(pixels, top, left, h, w, mirrored, destination):
        resize(pixels, top, top + h, left, left + w, destination)
        if mirrored:
            mirror(destination)
        return DONE

    @njit(nogil=True)
    def of_jpeg(data, height, width, top, left, h, w, mirrored, destination):
        pixels = np.zeros(height * width * 3, np.uint8)
        pixels[-3], pixels[-2], pixels[-1] = UNTOUCHED
        status = decode_jpeg(data, pixels, height, width, height, width, 0, 0, 1, 1, False, False)
        # FFCV reports warnings and refusals by the same status.
        refused = status != 0 and (pixels[-3], pixels[-2], pixels[-1]) == UNTOUCHED
        if refused:
            destination[:] = 0
            return NOT_DECODED
        of_pixels(pixels.reshape(height, width, 3), top, left, h, w, mirrored, destination)
        return DONE if status == 0 else DAMAGED

    return Crops(of_jpeg, of_pixels)


def crop_batch(crops: Crops, draw: Callable, rows: Callable) -> Callable:
    """Return the function that crops a batch of images, for FFCV to compile.

    draw chooses the box of an image (see crops.py), and rows is range or Numba's parallel prange. The function takes
    batch, int64 numbers of images, `BetonFile`'s images, and file, its (content, sizes). Compiled code treats its
    closure as constants, so values pass through memory: the epoch's key comes in by notes[:, 0], and the status of each
    image goes out by notes[:, 1].
    """
    crop_jpeg, crop_pixels = crops

    def crop(batch, memory, images, file):
        destination, notes = memory
        content, sizes = file
        for row in rows(len(batch)):
            record = images[batch[row]]
            height, width = np.int64(record["height"]), np.int64(record["width"])
            top, left, h, w, mirrored = draw(notes[row, 0], batch[row], height, width)
            start, output = np.int64(record["data_at"]), destination[row]
            data = content[start : start + np.int64(sizes[batch[row]])]
            if record["mode"] == JPEG:
                notes[row, 1] = crop_jpeg(data, height, width, top, left, h, w, mirrored, output)
            else:
                notes[row, 1] = crop_pixels(data.reshape(height, width, 3), top, left, h, w, mirrored, output)
        return destination[: len(batch)]

    crop.is_parallel = True  # type: ignore[attr-defined]  # FFCV reads it
    return crop
