"""A lock that forked processes share."""

from __future__ import annotations

import multiprocessing
from contextlib import AbstractContextManager
from typing import Any

from lbsgd.errors import DataError

ROOM = "make room there (in a container, --shm-size), or have it mounted for writing; the same command goes on"


def process_lock(room: str = ROOM) -> AbstractContextManager[Any]:
    """Return a new lock. Raises DataError if /dev/shm has no room for it, because the system's error names no place."""
    try:
        return multiprocessing.get_context("fork").RLock()
    except OSError as error:
        raise DataError(f"/dev/shm takes no lock of the processes ({error.strerror}); {room}") from None
