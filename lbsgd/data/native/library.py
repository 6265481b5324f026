"""Load this folder's compiled C files without Numba, which takes a second to import."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from sysconfig import get_config_var

from lbsgd.disk import exists
from lbsgd.errors import DataError

LIBRARY = "_kernels*.so"  # next to this file; setup.py names it


@cache
def library(folder: Path = Path(__file__).parent) -> ctypes.CDLL | None:
    """Load the compiled kernels, those of this Python first. Return None if no C compiler was there to make them.

    Raises DataError if the kernels cannot be loaded, or are of another version of lbsgd.
    """
    own = folder / LIBRARY.replace("*.so", str(get_config_var("EXT_SUFFIX")))
    path = own if exists(own) else next(folder.glob(LIBRARY), None)
    if path is None:
        return None
    try:
        return declared(ctypes.CDLL(str(path)))
    except AttributeError as error:
        raise DataError(f"{path} is of another version of lbsgd ({error}); `make setup` compiles it again") from None
    except OSError as error:  # libjpeg is missing, for example, and then it has no errno
        raise DataError(f"{path} cannot be loaded ({error}); `make setup` here installs what it needs") from None


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
