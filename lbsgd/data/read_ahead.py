"""The storage that images are read from: memory if the file fits there, else the disk, some batches ahead."""

from __future__ import annotations

import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from lbsgd.errors import ConfigError
from lbsgd.units import size

FITS = 0.8  # the part of the free memory that a file may fill; the rest is left to other programs
AHEAD_BYTES = 256 << 20
CHUNK = 64 << 20


@dataclass(frozen=True)
class ReadFrom:
    """The storage of a file. kind: memory (read whole before training), page cache or disk (read ahead in order)."""

    kind: str
    reason: str

    @classmethod
    def choose(cls, path: Path, in_memory: bool) -> ReadFrom:
        """Choose by the size of the file and the free memory. Raise ConfigError if it must fit and does not."""
        num_bytes, free = path.stat().st_size, psutil.virtual_memory().available
        sizes = f"{path.name} has {size(num_bytes)}, {size(free)} of memory are free"
        if in_memory and num_bytes > FITS * free:
            raise ConfigError(f"--in_memory: {sizes}; leave it out, or convert with a smaller --max_side")
        if in_memory:
            return cls("memory", sizes)
        return cls("page cache" if num_bytes <= FITS * free else "disk", sizes)


def read_whole(path: Path) -> None:
    """Read the file into the page cache, which all processes of the host share."""
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(CHUNK)
        while file.readinto(buffer):
            pass


class ReadAhead:
    """A thread that asks the kernel for the images of an epoch in the order of decoding, at most AHEAD_BYTES ahead.

    Without it, the decoder faults in one page at a time and waits for each. A kernel that knows of many images reads
    them at once. starts and sizes say where each image of the order lies in the file, in bytes.
    """

    def __init__(self, path: Path, starts: np.ndarray, sizes: np.ndarray) -> None:
        self.file = open(path, "rb", buffering=0)
        self.starts, self.ends = starts, np.cumsum(sizes.astype(np.int64))
        self.sizes = sizes
        self.decoded, self.asked, self.changed = 0, 0, threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self.run, name="lbsgd read ahead", daemon=True)
        self.thread.start()

    def advance(self, num_images: int) -> None:
        """Tell the thread that the first num_images of the order are decoded."""
        with self.changed:
            self.decoded = num_images
            self.changed.notify()

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or self.asked < self.target())
                if self.closed:
                    return
                first, last = self.asked, self.target()
                self.asked = last
            starts, sizes = self.starts[first:last].tolist(), self.sizes[first:last].tolist()
            for start, num_bytes in zip(starts, sizes, strict=True):
                begin = start - start % mmap.PAGESIZE
                os.posix_fadvise(self.file.fileno(), begin, start + num_bytes - begin, os.POSIX_FADV_WILLNEED)

    def target(self) -> int:
        """Return how many images of the order may have been asked for."""
        done = self.ends[self.decoded - 1] if self.decoded else 0
        return int(np.searchsorted(self.ends, done + AHEAD_BYTES))

    def close(self) -> None:
        """End the thread. A second call does nothing; FFCV's iterator makes one when it is deleted."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()
        self.file.close()
