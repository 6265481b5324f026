"""Load this folder's compiled C files without Numba, which takes a second to import."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from lbsgd.errors import DataError

LIBRARY = "_kernels*.so"  # next to this file; setup.py names it


@cache
def library(folder: Path = Path(__file__).parent) -> ctypes.CDLL | None:
    """Load the compiled kernels. Return None if the package was installed without a C compiler.

    Raises DataError if the kernels are of another version of lbsgd.
    """
    for path in folder.glob(LIBRARY):
        try:
            return declared(ctypes.CDLL(str(path)))
        except AttributeError as error:
            raise DataError(
                f"{path} is of another version of lbsgd ({error}); `make setup` compiles it again"
            ) from None
    return None


def declared(kernels: ctypes.CDLL) -> ctypes.CDLL:
    """Return the kernels with the types of all functions. Raises AttributeError if one is missing."""
    pointer, number = ctypes.c_void_p, ctypes.c_long
    kernels.lbsgd_decode_crop.restype = number
    kernels.lbsgd_decode_crop.argtypes = [pointer, *[number] * 8, pointer, number]
    kernels.lbsgd_resize.restype = number
    kernels.lbsgd_resize.argtypes = [pointer, number, *[ctypes.c_double] * 4, number, pointer, number]
    kernels.lbsgd_normalise_interleaved.restype = None
    kernels.lbsgd_normalise_interleaved.argtypes = [pointer, number, *[pointer] * 3]
    kernels.lbsgd_watch.restype = pointer
    kernels.lbsgd_watch.argtypes = [pointer, number, ctypes.c_char_p, number]
    kernels.lbsgd_forget.restype = None
    kernels.lbsgd_forget.argtypes = [pointer]
    return kernels
