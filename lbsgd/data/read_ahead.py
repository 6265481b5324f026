"""Choose the storage that images are read from: memory if the file fits, else the disk, some batches ahead."""

from __future__ import annotations

import mmap
import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from lbsgd.data.free_memory import free_memory
from lbsgd.errors import ConfigError
from lbsgd.units import size

FITS = 0.8  # the fraction of free memory that a file may fill; the rest is for other programs
AHEAD_BYTES = 256 << 20
CHUNK = 64 << 20
IMAGES_AT_ONCE = 1024  # looked up in the tables at a time


@dataclass(frozen=True)
class ReadFrom:
    """The storage of a file.

    kind    memory (read whole while training starts), page cache, or disk (read ahead in order)
    """

    kind: str
    reason: str

    @classmethod
    def choose(cls, path: Path, in_memory: bool) -> ReadFrom:
        """Choose by the file's size and the free memory. Raise ConfigError if the file must fit but does not."""
        num_bytes, free = path.stat().st_size, free_memory()
        sizes = f"{path.name} has {size(num_bytes)}, {size(free)} of memory are free"
        if in_memory and num_bytes > FITS * free:
            raise ConfigError(f"--in_memory: {sizes}; leave it out, or convert with a smaller --max_side")
        if in_memory:
            return cls("memory", sizes)
        return cls("page cache" if num_bytes <= FITS * free else "disk", sizes)


@cache
def warn(path: Path, reason: str) -> None:
    """Warn once that a file cannot be read ahead. Training goes on; a read that fails later ends the run."""
    with suppress(OSError, ValueError):  # the console may be gone
        print(f"warning: {path} cannot be read ahead ({reason}); images are read as they are needed", flush=True)


def read_whole(path: Path) -> None:
    """Read the file into the page cache, which all processes of the host share."""
    try:
        with open(path, "rb", buffering=0) as file:
            buffer = bytearray(CHUNK)
            while file.readinto(buffer):
                pass
    except OSError as error:
        warn(path, str(error.strerror))


class Chosen:
    """The rows of a column at given numbers, in their order; only a slice of them takes memory."""

    def __init__(self, column: np.ndarray, numbers: np.ndarray) -> None:
        self.column, self.numbers = column, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.column[self.numbers[rows]]


class ReadAhead:
    """A thread that asks the kernel for the images of an epoch in the order of decoding, at most AHEAD_BYTES ahead.

    Without it, the decoder faults in one page at a time and waits for each. A kernel that knows of many images reads
    them at once. starts and sizes are the place and the size of each image of the order in the file, in bytes.
    """

    def __init__(self, path: Path, starts: np.ndarray | Chosen, sizes: np.ndarray | Chosen) -> None:
        self.path, self.starts, self.sizes = path, starts, sizes
        self.decoded, self.asked, self.changed = 0, 0, threading.Condition()
        self.bytes_ahead, self.counted = 0, 0  # bytes asked for, without the first `counted` images, which are decoded
        self.closed = False
        self.thread = threading.Thread(target=self.run, name="lbsgd read ahead", daemon=True)
        self.thread.start()

    def advance(self, num_images: int) -> None:
        """Tell the thread that the first num_images images of the order are decoded."""
        with self.changed:
            self.decoded = num_images
            self.changed.notify()

    def run(self) -> None:
        try:
            with open(self.path, "rb", buffering=0) as file:
                self.follow(file.fileno())
        except OSError as error:
            warn(self.path, str(error.strerror))

    def follow(self, file: int) -> None:
        """Ask for more images whenever some have been decoded, until the end."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.decoded > self.counted or self.may_ask())
                if self.closed:
                    return
                decoded = self.decoded
            self.forget(decoded)
            self.ask(file)

    def may_ask(self) -> bool:
        next_one = self.sizes[self.asked : self.asked + 1]
        return len(next_one) > 0 and self.bytes_ahead + int(next_one[0]) < AHEAD_BYTES

    def forget(self, decoded: int) -> None:
        """Subtract the decoded images from bytes_ahead; some may have been too large to ask for."""
        self.bytes_ahead -= int(self.sizes[self.counted : min(decoded, self.asked)].sum())
        self.counted, self.asked = decoded, max(decoded, self.asked)

    def ask(self, file: int) -> None:
        """Ask for the next images of the order, while the images ahead have fewer than AHEAD_BYTES bytes."""
        rows = slice(self.asked, self.asked + IMAGES_AT_ONCE)
        for start, num_bytes in zip(self.starts[rows].tolist(), self.sizes[rows].tolist(), strict=True):
            if self.bytes_ahead + num_bytes >= AHEAD_BYTES:
                return
            begin = start - start % mmap.PAGESIZE
            os.posix_fadvise(file, begin, start + num_bytes - begin, os.POSIX_FADV_WILLNEED)
            self.asked += 1
            self.bytes_ahead += num_bytes

    def close(self) -> None:
        """End the thread. A second call, such as when FFCV's iterator is deleted, does nothing."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()
