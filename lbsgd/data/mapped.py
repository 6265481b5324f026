"""Map a file so that its loss while it is read ends the process with one line instead of a bus error."""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path

import numpy as np

from lbsgd.data.native.library import library
from lbsgd.errors import DataError
from lbsgd.units import harmless


def mapped(path: Path, way_out: str) -> np.ndarray:
    """Return the bytes of a file, uint8 and read-only. Raises OSError, and ValueError for an empty file.

    If a page can no longer be read, because the file has shrunk or its disk fails, the process prints a line with the
    way out and ends with DataError's exit code (bus_error.c). Without the compiled kernels it ends by a bus error.
    """
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    content = np.frombuffer(mapping, np.uint8)
    if kernels := library():
        line = f"{DataError.label}: {path} cannot be read any more: it was made shorter, or its disk fails; {way_out}"
        watched = kernels.lbsgd_watch(
            content.ctypes.data, len(content), os.fsencode(harmless(line) + "\n"), DataError.exit_code
        )
        weakref.finalize(mapping, kernels.lbsgd_forget, watched).atexit = False
    return content
